"""A strength that rises, stays level and falls."""

from __future__ import annotations

from dataclasses import dataclass

from steer.errors import ConfigError
from steer.intervene.schedule import SCHEDULES, Schedule, check_positive


@SCHEDULES.register("warmup_decay")
@dataclass(frozen=True)
class WarmupDecay(Schedule):
    """Linear rise from 0 to 1 over `warmup` steps, level until `total - decay`, linear fall to 0 at `total`.

    Raises:
        ConfigError: warm-up and decay overlap.

    Example:
        >>> [steer.WarmupDecay(warmup=10, decay=20, total=100)(step) for step in (0, 5, 50, 90, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    warmup: int
    decay: int
    total: int

    def __post_init__(self) -> None:
        check_positive(warmup=self.warmup, decay=self.decay, total=self.total)
        if self.warmup + self.decay > self.total:
            raise ConfigError(
                "warm-up and decay overlap",
                expected=f"warmup + decay <= {self.total}, the total",
                found=f"{self.warmup} + {self.decay}",
                remedy="shorten one of them, or raise total",
            )

    def __call__(self, step: int) -> float:
        return max(0.0, min(1.0, step / self.warmup, (self.total - step) / self.decay))
