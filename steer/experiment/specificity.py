"""Is an effect that of this edit, and does it reach every item? Rank among matched random edits, share of items that move the wrong way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from scipy.stats import binomtest

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.stats import ALPHA, LEVEL, ROUNDING, Table, Values, between_0_and_1, items_and_seeds


@dataclass(frozen=True)
class ControlRank:
    """Place of a treatment among its control draws.

    Attributes:
        effect: of the treatment, in its own direction: positive is what was wanted.
        controls: those of its control draws, in the same direction.
        rank: 1 when no control reaches the treatment.
        p: (1 + controls that reach it) / (draws + 1).
        smallest_p: 1 / (draws + 1): what this number of draws can show at best.
    """

    effect: float
    controls: tuple[float, ...]
    rank: int
    p: float
    smallest_p: float

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the rank does."""
        draws, among = len(self.controls), f"{len(self.controls)} control draw{'s' * (len(self.controls) > 1)}"
        if self.p <= ALPHA * (1 + ROUNDING):
            return f"specific: rank {self.rank} among {among}, p={self.p:.2g}"
        if self.smallest_p > ALPHA * (1 + ROUNDING):
            tail = f"{draws} draw{'s' * (draws > 1)} cannot give less than {self.smallest_p:.2g}"
            return f"not shown to be specific: rank {self.rank} among {among}, p={self.p:.2g}; {tail}"
        return f"not shown to be specific: rank {self.rank} among {among}, p={self.p:.2g}"


@dataclass(frozen=True)
class WrongWay:
    """Share of items that an edit moves against what was wanted, with its interval.

    Attributes:
        share, low, high: of the items, at `level`.
        wrong, unchanged, items: numbers of items.
    """

    share: float
    low: float
    high: float
    wrong: int
    unchanged: int
    items: int
    level: float = LEVEL


def rank_among_controls(effect: float, controls: Values, *, wanted: str) -> ControlRank:
    """Ranks the effect of a treatment among matched random edits (Monte Carlo test: Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).

    Under the null the treatment is one more draw of its controls. The test asks nothing of how they are distributed, and is one-sided: a
    control that moves the metric the other way counts as less. 19 draws are needed for p = 0.05.

    Args:
        effect: mean over items and seeds, treatment minus reference.
        controls: [draws], the same of each control draw, minus the same reference.
        wanted: 'higher' or 'lower': which effect was the aim.

    Raises:
        ConfigError: no controls, an unknown `wanted`. NonFiniteError: a value that is nan or infinite.

    Example:
        >>> rank_among_controls(-0.4, [-0.1, 0.2, -0.45, 0.0], wanted="lower")
        ControlRank(effect=0.4, controls=(0.1, -0.2, 0.45, -0.0), rank=2, p=0.4, smallest_p=0.2)
    """
    sign = _sign(wanted)
    own = sign * _finite(effect, "the treatment")
    draws = tuple(sign * _finite(control, f"control draw {i}") for i, control in enumerate(controls))
    if not draws:
        raise _no_controls()
    at_least = sum(control >= own for control in draws)
    return ControlRank(own, draws, 1 + at_least, (1 + at_least) / (len(draws) + 1), 1 / (len(draws) + 1))


def wrong_way(differences: Table, *, wanted: str, level: float = LEVEL) -> WrongWay:
    """Share of items that move against the aim, with Wilson's interval (1927, doi 10.1080/01621459.1927.10502953).

    Seeds are averaged first. A mean can move as wanted while half of the items move the other way. An item that does not move at all is
    counted apart.

    Args:
        differences: [items, seeds] or [items], treatment minus reference.
        wanted: 'higher' or 'lower': which difference was the aim.

    Example:
        >>> wrong_way([0.4, 0.1, -0.2, 0.6], wanted="higher")
        WrongWay(share=0.25, low=0.0455..., high=0.699..., wrong=1, unchanged=0, items=4, level=0.95)
    """
    between_0_and_1(level, "the level of an interval")
    table = items_and_seeds(differences, "differences") * _sign(wanted)
    of_item = table.mean(1)  # [items]
    # A mean over seeds that cancel is not 0 in its last digits.
    of_item = np.where(abs(of_item) <= 1e-12 * abs(table).max(1), 0, of_item)
    wrong, items = int((of_item < 0).sum()), len(of_item)
    bounds = binomtest(wrong, items).proportion_ci(level, method="wilson")
    return WrongWay(wrong / items, float(bounds.low), float(bounds.high), wrong, int((of_item == 0).sum()), items, level)


def _finite(value: SupportsFloat, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise _no_number(name, value) from None
    if not math.isfinite(number):
        raise _non_finite(name, number)
    return number


def _sign(wanted: str) -> int:
    if wanted not in ("higher", "lower"):
        raise _unknown_aim(wanted)
    return 1 if wanted == "higher" else -1


# ---- errors


def _no_controls() -> ConfigError:
    remedy = "add draws of a matched random edit; 19 are needed for p = 0.05"
    return ConfigError("a rank among controls needs controls", expected="at least one draw", found="none", remedy=remedy)


def _no_number(name: str, value: object) -> ConfigError:
    remedy = "give the mean of its differences over items and seeds"
    return ConfigError(f"the effect of {name} is no number", expected="a number", found=str(value)[:60], remedy=remedy)


def _non_finite(name: str, value: float) -> NonFiniteError:
    remedy = "look at the cells of that arm and at the loss"
    return NonFiniteError(f"the effect of {name} is not finite", expected="a finite number", found=value, remedy=remedy)


def _unknown_aim(wanted: object) -> ConfigError:
    remedy = "say which way the edit was meant to move the metric"
    return ConfigError("the aim is unknown", expected="'higher' or 'lower'", found=wanted, remedy=remedy)
