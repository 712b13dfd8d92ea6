"""A strength that rises or falls in a straight line."""

from __future__ import annotations

from dataclasses import dataclass

from steer.intervene.schedule import SCHEDULES, Schedule, check_finite, check_positive


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` in a straight line over `steps` optimiser steps, `end` afterwards.

    Example:
        >>> [steer.Linear(steps=100)(step) for step in (0, 50, 100)]
        [0.0, 0.5, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_positive(steps=self.steps)
        check_finite(start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
