"""Values of one outcome in every arm, as the chart and the tables show them: against the base model where that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steer.report.numbers import estimate, is_interval, measured, number

BETTER = {"lower": "lower is better", "higher": "higher is better"}


@dataclass(frozen=True)
class ArmRow:
    """One outcome of one arm, in the unit of the outcome.

    Attributes:
        index: number of the arm, which chooses its colour.
        value, low, high: mean and 95 % interval; None where not measured.
        seeds: the mean of each seed, where there are several.
        draws: the mean of each draw of a control.
        mean, before: of the arm and of the base model, not as a difference.
    """

    name: str
    label: str
    index: int
    value: float | None
    low: float | None
    high: float | None
    seeds: dict[str, float] = field(default_factory=dict)
    draws: tuple[float, ...] = ()
    is_control: bool = False
    mean: float | None = None
    before: float | None = None

    @property
    def numbers(self) -> list[float]:
        """All that has to find room on an axis."""
        return [x for x in (self.value, self.low, self.high, *self.seeds.values(), *self.draws) if measured(x)]

    @property
    def holds_for(self) -> str:
        """What the interval of a control does not speak beyond: other draws would have another mean. Empty for other arms."""
        if len(self.draws) < 2:
            return ""
        low, high = (number(bound, signed=True) for bound in (min(self.draws), max(self.draws)))
        return f"for these {len(self.draws)} draws, whose means go from {low} to {high}"

    def words(self, *, signed: bool) -> str:
        """Mean with interval, as text."""
        return estimate(self.value, [self.low, self.high], signed=signed)


def primary_outcome(metrics: Mapping[str, Any]) -> str | None:
    """Name of the outcome that the verdict is about."""
    outcomes = metrics.get("outcomes") or {}
    return next((name for name, outcome in outcomes.items() if outcome.get("role") == "primary"), next(iter(outcomes), None))


def is_change(metrics: Mapping[str, Any], outcome: str) -> bool:
    """The base model was measured, so that every arm has a change."""
    found = [values for arm in metrics.get("arms") or [] if (values := (arm.get("outcomes") or {}).get(outcome))]
    return bool(found) and all("change" in values for values in found)


def arm_rows(metrics: Mapping[str, Any], outcome: str) -> list[ArmRow]:
    """One outcome of every arm, in their order; an arm that lacks it has no value."""
    against_base = is_change(metrics, outcome)
    return [_row(arm, i, (arm.get("outcomes") or {}).get(outcome) or {}, against_base) for i, arm in enumerate(metrics.get("arms") or [])]


def _row(arm: Mapping[str, Any], index: int, values: Mapping[str, Any], against_base: bool) -> ArmRow:
    before = values.get("before")
    zero = before if against_base and measured(before) else 0.0
    value = values.get("change" if against_base else "mean")
    ci = values.get("change_ci" if against_base else "ci")
    low, high = ci if is_interval(ci) else (None, None)
    by_seed = {seed: x - zero for seed, x in (values.get("by_seed") or {}).items() if measured(x)}
    return ArmRow(
        str(arm["name"]),
        str(arm.get("label") or arm["name"]),
        index,
        value if measured(value) else None,
        low,
        high,
        by_seed if len(by_seed) > 1 else {},
        tuple(x - zero for x in values.get("by_draw") or () if measured(x)),
        arm.get("control_of") is not None,
        values.get("mean"),
        before,
    )


def readable(name: str) -> str:
    """Name of an outcome for a sentence."""
    return name.replace("_", " ")


def axis_label(metrics: Mapping[str, Any], outcome: str, what: str = "") -> str:
    """`behaviour gap, change from the base model, nat/token`."""
    unit = ((metrics.get("outcomes") or {}).get(outcome) or {}).get("unit") or ""
    return ", ".join(filter(None, (readable(outcome), what, unit)))


def better_label(metrics: Mapping[str, Any], outcome: str) -> str:
    """`lower is better`, or nothing where no direction was said."""
    return BETTER.get(((metrics.get("outcomes") or {}).get(outcome) or {}).get("better") or "", "")
