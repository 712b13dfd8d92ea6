"""Contrasts of two arms, corrected for the role that each plays in a question: primary, secondary (planned), exploratory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from steer.errors import ConfigError
from steer.experiment.corrections import adjusted_bh, adjusted_holm, adjusted_max_t
from steer.experiment.crossed import FLIPPED_SEEDS, Estimate, crossed
from steer.experiment.cuped import Adjusted, cuped
from steer.experiment.stats import ALPHA, ROUNDING, Array, Table, Values, between_0_and_1, paired, written

Role = Literal["primary", "secondary", "exploratory"]
Correction = Literal["none", "Holm", "max-T", "Benjamini-Hochberg"]


@dataclass(frozen=True)
class Contrast:
    """Two arms on the same items and seeds.

    Attributes:
        metric, unit: what was measured, and in what (may be empty).
        a, b: names of the arms.
        estimate: of a minus b, its interval at the level that goes with the corrected p: `shown` exactly when zero lies outside.
        p_adjusted: p after `correction` over `family` contrasts.
        alpha: share of true nulls that may be called shown; of the shown contrasts, for Benjamini-Hochberg.
        adjustment: theta and variance reduction of a covariate; None without one.
    """

    metric: str
    a: str
    b: str
    unit: str
    estimate: Estimate
    p_adjusted: float
    role: Role = "primary"
    correction: Correction = "none"
    family: int = 1
    alpha: float = ALPHA
    adjustment: Adjusted | None = None
    differences: Array = field(repr=False, compare=False, kw_only=True)  # [items, seeds]
    seed: int = 0  # of the random sign patterns

    @property
    def difference(self) -> float:
        """Mean of a minus b."""
        return self.estimate.mean

    @property
    def p(self) -> float:
        """Two-sided, not corrected."""
        return self.estimate.p

    @property
    def shown(self) -> bool:
        """The difference is significant at alpha after the correction."""
        return self.p_adjusted <= self.alpha * (1 + ROUNDING)

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the test does."""
        unit = f" {self.unit}" if self.unit else ""
        tail = f"p={self.p_adjusted:.2g}{self._corrected()}, {self.estimate.sample}"
        low, high = self.estimate.low, self.estimate.high
        if not self.estimate.bounded:
            (size,) = written(self.difference, signed=True)
            sample = f"{self.estimate.items} items" if self.estimate.seeds == 1 else self.estimate.sample
            return f"{self.metric}: {sample} are too few to show a difference between {self.a} and {self.b} ({size}{unit}, {tail})"
        if self.shown:
            sign = -1 if self.difference < 0 else 1
            texts = written(abs(self.difference), *sorted((sign * low, sign * high)))
            word = "lower" if sign < 0 else "higher"
            return f"{self.metric}: {self.a} is {word} than {self.b} by {texts[0]}{unit} [{texts[1]}, {texts[2]}], {tail}"
        texts = written(self.difference, low, high, signed=True)
        measured = f"{texts[0]}{unit} [{texts[1]}, {texts[2]}], {tail}"
        return f"{self.metric}: no difference shown between {self.a} and {self.b} ({measured})"

    def _corrected(self) -> str:
        words = ["exploratory"] if self.role == "exploratory" else []
        if self.family > 1:
            words.append(f"{self.correction}, {self.family} contrasts")
            words.append(f"interval at {100 * self.estimate.level:.3g} %")
        return f" ({'; '.join(words)})" if words else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in metrics.json; a bound that is not there is null."""
        keys = ("metric", "a", "b", "difference", "p", "p_adjusted", "unit", "role", "correction", "verdict")
        bounds = [x if math.isfinite(x) else None for x in (self.estimate.low, self.estimate.high)]
        counts = {"n": self.estimate.items, "seeds": self.estimate.seeds}
        return {"ci": bounds, "level": self.estimate.level, **counts, **{key: getattr(self, key) for key in keys}}


@dataclass(frozen=True)
class Answer:
    """The contrasts of one question, each corrected as its role asks."""

    primary: Contrast
    secondary: tuple[Contrast, ...]
    exploratory: tuple[Contrast, ...]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """All of them, the primary one first."""
        return (self.primary, *self.secondary, *self.exploratory)


def contrast(
    metric: str,
    a: str,
    b: str,
    of_a: Table,
    of_b: Table,
    *,
    unit: str = "",
    alpha: float = ALPHA,
    covariate: Values | None = None,
    pool: Values | None = None,
    seed: int = 0,
) -> Contrast:
    """Compares two arms item by item and seed by seed; not corrected yet.

    Args:
        metric, unit: what was measured, and in what.
        a, b: names of the arms.
        of_a, of_b: [items, seeds] or [items], entries at one place belonging to the same item and seed.
        covariate, pool: [items] and [N], of the items and of all that they were drawn from (see `cuped`).
        seed: of random sign patterns.

    Raises:
        ConfigError: arms that differ in items or seeds, fewer than two items. NonFiniteError: a value that is nan or infinite.

    Example:
        >>> contrast("gap", "warm", "plain", [0.9, 0.8, 0.7, 0.9, 0.6, 0.8], [0.2, 0.3, 0.1, 0.4, 0.3, 0.2]).verdict
        'gap: warm is higher than plain by 0.53 [0.30, 0.70], p=0.031, 6 items, one seed'
    """
    between_0_and_1(alpha, "alpha")
    differences = paired(of_a, of_b, metric, a, b)
    adjustment = None
    if covariate is not None:
        adjustment = cuped(differences, covariate, pool)
        differences = adjustment.differences
    estimate = crossed(differences, level=1 - alpha, seed=seed)
    return Contrast(metric, a, b, unit, estimate, estimate.p, alpha=alpha, adjustment=adjustment, differences=differences, seed=seed)


def answer(primary: Contrast, secondary: Sequence[Contrast] = (), exploratory: Sequence[Contrast] = ()) -> Answer:
    """Corrects the contrasts of one question: alpha for the primary one, max-T for planned ones, a false discovery rate for the rest.

    A contrast that was not asked about beforehand is exploratory; it takes nothing from the others' p.

    Raises:
        ConfigError: one contrast in two places; planned contrasts over different seeds or at different alphas.

    Example:
        >>> answer(warm_minus_plain, secondary=[warm_minus_random]).secondary[0].correction
        'Holm'
    """
    asked = [(each.metric, frozenset((each.a, each.b))) for each in (primary, *secondary, *exploratory)]
    if len(set(asked)) < len(asked):
        raise _asked_twice(next(key for key in asked if asked.count(key) > 1))
    return Answer(_corrected(primary, primary.p, "primary", "none", 1), tuple(max_t(secondary)), tuple(benjamini_hochberg(exploratory)))


def max_t(contrasts: Sequence[Contrast], *, seed: int = 0) -> list[Contrast]:
    """The same planned contrasts, in the same order, with p corrected by step-down max-T; by Holm below six seeds."""
    _one_family(contrasts)
    if any(each.estimate.seeds < FLIPPED_SEEDS or each.estimate.se == 0 for each in contrasts):
        return holm(contrasts)
    adjusted = adjusted_max_t([(each.differences, each.estimate) for each in contrasts], seed=seed)
    return [_corrected(each, p, "secondary", "max-T", len(contrasts)) for each, p in zip(contrasts, adjusted, strict=True)]


def holm(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same planned contrasts, in the same order, with p corrected by Holm."""
    _one_family(contrasts)
    adjusted = adjusted_holm([each.p for each in contrasts])
    return [_corrected(each, p, "secondary", "Holm", len(contrasts)) for each, p in zip(contrasts, adjusted, strict=True)]


def benjamini_hochberg(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same contrasts, in the same order, exploratory, with p corrected for the false discovery rate."""
    adjusted = adjusted_bh([each.p for each in contrasts])
    return [_corrected(each, p, "exploratory", "Benjamini-Hochberg", len(contrasts)) for each, p in zip(contrasts, adjusted, strict=True)]


def _corrected(one: Contrast, p_adjusted: float, role: Role, correction: Correction, family: int) -> Contrast:
    """A contrast with its corrected p and the interval at the level that goes with it."""
    share = one.p / p_adjusted if p_adjusted > 0 else 1 / family  # 0 / 0 where p is smaller than a float can be
    if share < 1:
        share *= 1 + ROUNDING  # where the corrected p is alpha, zero would be a bound, on either side of it by rounding
    level = 1 - one.alpha * share
    estimate = one.estimate if level == one.estimate.level else crossed(one.differences, level=level, seed=one.seed)
    return replace(one, estimate=estimate, p_adjusted=p_adjusted, role=role, correction=correction, family=family)


def _one_family(contrasts: Sequence[Contrast]) -> None:
    for what in ("seeds", "alphas"):
        values = sorted({each.estimate.seeds if what == "seeds" else each.alpha for each in contrasts})
        if len(values) > 1:
            raise _mixed_family(what, values)


# ---- errors


def _asked_twice(contrast: tuple[str, frozenset[str]]) -> ConfigError:
    metric, arms = contrast
    remedy = "give each contrast once, as primary, secondary or exploratory"
    found = f"{metric} of {' and '.join(sorted(arms))} more than once"
    return ConfigError("a contrast has more than one role", expected="each once", found=found, remedy=remedy)


def _mixed_family(what: str, values: Sequence[float]) -> ConfigError:
    remedy = "measure planned contrasts on the same seeds and test them at one alpha, or make them questions of their own"
    return ConfigError(f"planned contrasts differ in their {what}", expected=f"the same {what}", found=values, remedy=remedy)
