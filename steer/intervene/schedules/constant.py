"""A strength that does not change."""

from __future__ import annotations

from dataclasses import dataclass

from steer.intervene.schedule import SCHEDULES, Schedule, check_finite


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor at every step.

    Args:
        value: the factor.

    Example:
        >>> steer.Constant(0.5)(1000)
        0.5
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_finite(value=self.value)

    def __call__(self, step: int) -> float:
        return self.value
