"""Intervals of optimiser steps."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import ConfigError
from steer.training.interval import Interval


def test_every_multiple_of_the_interval_is_due_once() -> None:
    interval = Interval(3)
    assert [step for step in range(1, 10) if interval.is_due(step, step - 1)] == [3, 6, 9]
    assert interval.is_due(7, 5) and not interval.is_due(5, 4) and not interval.is_due(3, 3)  # several steps, or none, in a batch
    assert all(Interval(1).is_due(step, step - 1) for step in range(1, 5))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3", None])
def test_what_is_no_interval(steps: Any) -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        Interval(steps)
