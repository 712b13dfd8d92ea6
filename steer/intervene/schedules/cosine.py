"""A strength that follows half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steer.intervene.schedule import SCHEDULES, Schedule, check_finite, check_positive


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine over `steps` optimiser steps, `end` afterwards.

    Example:
        >>> [round(steer.Cosine(steps=100)(step), 2) for step in (0, 50, 100)]
        [1.0, 0.5, 0.0]
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_positive(steps=self.steps)
        check_finite(start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2
