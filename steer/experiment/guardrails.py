"""Guardrails: a metric that an edit may not make worse by more than a margin that was given in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from steer.errors import ConfigError, did_you_mean
from steer.experiment.crossed import Estimate, crossed
from steer.experiment.stats import ALPHA, ROUNDING, Table, between_0_and_1, paired, written

Better = Literal["higher", "lower"]
Outcome = Literal["kept", "exceeded", "not shown to be kept"]


@dataclass(frozen=True)
class Guardrail:
    """Non-inferiority of an arm to its reference on one metric.

    Attributes:
        metric, unit: what was measured, and in what (may be empty).
        arm, reference: names of the arms.
        margin: the largest harm that was declared harmless, in the unit of the metric.
        harm: how much worse the arm is; both ends of its interval are one-sided bounds at alpha.
        p: one-sided, of a harm as large as the margin.
        alpha: share of arms beyond the margin that may pass.
    """

    metric: str
    arm: str
    reference: str
    margin: float
    harm: Estimate
    p: float
    unit: str = ""
    alpha: float = ALPHA

    @property
    def outcome(self) -> Outcome:
        """Kept when the harm is shown to be below the margin, exceeded when it is shown to be above; else neither is shown."""
        if self.p <= self.alpha * (1 + ROUNDING):
            return "kept"
        return "exceeded" if 1 - self.p <= self.alpha * (1 + ROUNDING) else "not shown to be kept"

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the test does: 'no harm shown' is not 'no harm'."""
        upper = self.outcome != "exceeded"
        harm, bound, margin = written(self.harm.mean, self.harm.high if upper else self.harm.low, self.margin, signed=True)
        unit = f" {self.unit}" if self.unit else ""
        end = f"at {'most' if upper else 'least'} {bound}" if self.harm.bounded else "without a bound"
        sure = f"one-sided {100 * (1 - self.alpha):.3g} %"
        measured = f"worse than {self.reference} by {harm}{unit}, {end}, {sure}; margin {margin}"
        return f"{self.metric}: margin {self.outcome} by {self.arm} ({measured})"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a bound that is not there is null."""
        keys = ("metric", "arm", "reference", "unit", "margin", "alpha", "p", "outcome", "verdict")
        bounds = [x if math.isfinite(x) else None for x in (self.harm.low, self.harm.high)]
        counts = {"n": self.harm.items, "seeds": self.harm.seeds}
        return {"harm": self.harm.mean, "bounds": bounds, **counts, **{key: getattr(self, key) for key in keys}}


def guardrail(
    metric: str,
    arm: str,
    reference: str,
    of_arm: Table,
    of_reference: Table,
    *,
    margin: float | None,
    better: Better,
    unit: str = "",
    alpha: float = ALPHA,
    seed: int = 0,
) -> Guardrail:
    """Tests that an arm is worse than its reference by less than a margin (non-inferiority: Piaggio et al. 2012, 10.1001/jama.2012.87802).

    Several guardrails that all have to be kept need no correction: each has to pass by itself.

    Args:
        metric, unit: what was measured, and in what.
        arm, reference: names of the arms.
        of_arm, of_reference: [items, seeds] or [items], paired as in `contrast`.
        margin: the largest harmless harm, 0 or more, in the unit of the metric; fixed before the measurement.
        better: which way the metric is better.
        alpha: of the one-sided bounds.

    Raises:
        ConfigError: no margin, a negative one; an unknown `better`; arms that cannot be paired. NonFiniteError: a value that is not finite.

    Example:
        >>> loss, before = [2.01, 2.32, 1.94, 2.11, 2.20, 2.05], [2.00, 2.31, 1.95, 2.10, 2.20, 2.04]
        >>> guardrail("neutral loss", "warm", "plain", loss, before, margin=0.02, better="lower").outcome
        'kept'
    """
    if margin is None:
        raise _no_margin(metric)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise _bad_margin(metric, margin)
    if better not in ("higher", "lower"):
        raise _unknown_side(metric, better)
    between_0_and_1(alpha, "alpha")
    if alpha >= 0.5:
        raise _no_bound(alpha)
    worse = paired(of_arm, of_reference, metric, arm, reference) * (1 if better == "lower" else -1)  # [items, seeds]
    harm = crossed(worse, level=1 - 2 * alpha, seed=seed)
    from_margin = crossed(worse - margin, level=1 - 2 * alpha, seed=seed)
    p = from_margin.p / 2 if from_margin.mean < 0 else 1 - from_margin.p / 2
    return Guardrail(metric, arm, reference, float(margin), harm, p, unit, alpha)


# ---- errors


def _no_margin(metric: str) -> ConfigError:
    remedy = "say before the measurement which harm is harmless, e.g. margin=0.02; without a margin no result could fail"
    return ConfigError(f"guardrail '{metric}' has no margin", expected="a margin in the unit of the metric", found=None, remedy=remedy)


def _bad_margin(metric: str, margin: object) -> ConfigError:
    remedy = "give the size of the harm that is still harmless; which way is worse follows from `better`"
    return ConfigError(f"wrong margin of guardrail '{metric}'", expected="a finite number, 0 or more", found=margin, remedy=remedy)


def _unknown_side(metric: str, better: object) -> ConfigError:
    remedy = did_you_mean(str(better), ("higher", "lower")) or "say which values of the metric are better"
    return ConfigError(f"guardrail '{metric}' does not know what is worse", expected="'higher' or 'lower'", found=better, remedy=remedy)


def _no_bound(alpha: float) -> ConfigError:
    return ConfigError("alpha is too large for a one-sided bound", expected="below 0.5", found=alpha, remedy="0.05 is usual")
