"""Interval: every so many optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass

from steer.checks import whole_number
from steer.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """Every so many optimiser steps.

        Interval(10).is_due(step=20, last_step=19)  # True

    Args:
        every_n_steps: optimiser steps, 1 or more.

    Raises:
        ConfigError: it is no such number.
    """

    every_n_steps: int

    def __post_init__(self) -> None:
        whole_number(self.every_n_steps, "every_n_steps")
        if self.every_n_steps < 1:
            raise _too_small(self.every_n_steps)

    def is_due(self, step: int, last_step: int) -> bool:
        """True when a multiple of the interval lies after `last_step` and not after `step`; a trainer may take several steps in a batch."""
        return step // self.every_n_steps > last_step // self.every_n_steps


def _too_small(steps: int) -> ConfigError:
    remedy = "pass every_n_steps=1 to measure after every step, a larger number to measure less often"
    return ConfigError("every_n_steps is too small", expected=">= 1", found=steps, remedy=remedy)
