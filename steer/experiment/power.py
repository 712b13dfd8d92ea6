"""What a design can show: the smallest effect for its items and seeds, and the items or seeds that an effect takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.stats import t as student

from steer import checks
from steer.errors import ConfigError
from steer.experiment.crossed import Variances, satterthwaite
from steer.experiment.stats import ALPHA, between_0_and_1

POWER = 0.8
MOST = 10**6  # items or seeds; what takes more is said to be out of reach


@dataclass(frozen=True)
class Needed:
    """A design that shows an effect, or why none does.

    Attributes:
        items, seeds: of the design; None for the number that was asked for when no number suffices.
        effect: that has to be shown.
        reached: smallest effect of the design; of endless items or seeds where none suffices.
    """

    items: int | None
    seeds: int | None
    effect: float
    reached: float

    @property
    def statement(self) -> str:
        """The answer in a sentence."""
        if self.items is None:
            return f"no number of items suffices for {self.effect:.3g} with {_seeds(self.seeds)} ({self.reached:.3g} at best): add seeds"
        if self.seeds is None:
            return f"no number of seeds suffices for {self.effect:.3g} with {self.items} items ({self.reached:.3g} at best): add items"
        return f"{self.items} items × {_seeds(self.seeds)} show an effect of {self.effect:.3g}"


def smallest_effect(variances: Variances, items: int, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Smallest effect that a design shows with the given power (minimal detectable effect; Bloom 1995, doi 10.1177/0193841X9501900504).

    (t at 1 - alpha/2 + t at power) times the standard error, with the degrees of freedom of `crossed`. One seed is a sample of items: the
    result then speaks about these weights only.

    Args:
        variances: of an earlier experiment (`Estimate.variances`), or assumed.
        items, seeds: of the design; two items or more.

    Example:
        >>> round(smallest_effect(Variances(items=0.036, seeds=0.01, residual=0.02), items=24, seeds=5), 2)
        0.19
    """
    _check(variances, items, seeds, alpha, power)
    variance, df = _standard_error(variances, items, seeds)
    return float(student.ppf(1 - alpha / 2, df) + student.ppf(power, df)) * math.sqrt(variance)


def items_needed(variances: Variances, effect: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> Needed:
    """Fewest items that show an effect with this many seeds; more items do not repair few seeds.

    Example:
        >>> items_needed(Variances(items=0.036, seeds=0.01, residual=0.02), effect=0.1, seeds=3).statement
        'no number of items suffices for 0.1 with 3 seeds (0.31 at best): add seeds'
    """
    _check_effect(effect)
    items, reached = _fewest(lambda items: smallest_effect(variances, items, seeds, alpha=alpha, power=power), effect, least=2)
    return Needed(items, seeds, effect, reached)


def seeds_needed(variances: Variances, effect: float, items: int, *, alpha: float = ALPHA, power: float = POWER) -> Needed:
    """Fewest seeds, two or more, that show an effect on this many items.

    Example:
        >>> seeds_needed(Variances(items=0.036, seeds=0.01, residual=0.02), effect=0.15, items=24).seeds
        10
    """
    _check_effect(effect)
    seeds, reached = _fewest(lambda seeds: smallest_effect(variances, items, seeds, alpha=alpha, power=power), effect, least=2)
    return Needed(items, seeds, effect, reached)


def _standard_error(variances: Variances, items: int, seeds: int) -> tuple[float, float]:
    """Variance of the mean and its degrees of freedom, both as expected."""
    if seeds == 1:
        return (variances.items + (variances.residual or 0.0)) / items, items - 1
    of_seeds, residual = variances.seeds or 0.0, variances.residual or 0.0
    squares = (seeds * variances.items + residual, items * of_seeds + residual, residual)
    _, df = satterthwaite(squares, items, seeds)  # type: ignore[arg-type]
    return variances.items / items + of_seeds / seeds + residual / (items * seeds), float(df)


def _fewest(reaches: Callable[[int], float], effect: float, least: int) -> tuple[int | None, float]:
    """Fewest items or seeds whose smallest effect is small enough, and that effect; with None the effect of `MOST`."""
    enough = least
    while reaches(enough) > effect:
        if enough == MOST:
            return None, reaches(MOST)
        enough = min(2 * enough, MOST)
    short = max(least - 1, enough // 2)  # too few, unless even the least suffices
    while enough - short > 1:
        middle = (enough + short) // 2
        short, enough = (short, middle) if reaches(middle) <= effect else (middle, enough)
    return enough, reaches(enough)


def _check(variances: Variances, items: int, seeds: int, alpha: float, power: float) -> None:
    checks.whole_number(items, "items", least=2)
    checks.whole_number(seeds, "seeds", least=1)
    between_0_and_1(alpha, "alpha")
    between_0_and_1(power, "power")
    if seeds > 1 and (variances.seeds is None or variances.residual is None):
        raise _seeds_unknown(seeds)
    for name in ("items", "seeds", "residual"):
        if (value := getattr(variances, name)) is not None:
            checks.number_within(value, f"the variance of {name}", 0.0)


def _check_effect(effect: float) -> None:
    checks.finite_number(effect, "the effect to be shown", above=0.0)


def _seeds(seeds: int | None) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"


# ---- errors


def _seeds_unknown(seeds: int) -> ConfigError:
    remedy = "take the variances of an experiment with two seeds or more, or assume some: Variances(items=..., seeds=..., residual=...)"
    return ConfigError("one seed says nothing of the variance of seeds", expected=f"variances for {seeds} seeds", found=None, remedy=remedy)
