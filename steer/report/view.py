"""From the tree of metrics.json to the words, numbers and tables of the page and of the summary.

Everything in the tree but its schema may be missing; what is missing says so, and nothing here computes a statistic anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.report.numbers import common_digits, interval, is_interval, measured, moment, number, p_value
from steer.report.rows import ArmRow, arm_rows, axis_label, better_label, is_change, primary_outcome, readable

WHEN = {
    "never": "not treated",
    "train": "in training, off afterwards",
    "inference": "at inference",
    "both": "in training and at inference",
    "baked": "baked into the weights",
}
HELD_OUT = {"texts": "on unseen texts of groups that it may know", "groups": "on groups that it has not seen"}


@dataclass(frozen=True)
class Forest:
    """An interval on a scale of 0 to 100 that its whole column shares; None where there is none."""

    zero: float
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cell:
    """One outcome of one arm, as text. change: against the base model; empty where that was not measured. holds_for: its interval."""

    value: str
    ci: str
    before: str
    after: str
    forest: Forest | None
    holds_for: str = ""


@dataclass(frozen=True)
class Badge:
    """A word about the standing of the answer. kind: `good`, `warn` or `plain`."""

    text: str
    kind: str = "plain"


def direction_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The direction that is used and how well it separates; runs of the first schema recorded it as their trait."""
    found = metrics.get("direction") or {}
    own = {**found, "vector_norm": found.get("norm"), "kind": HELD_OUT.get(found.get("held_out", ""), "")} if found else {}
    return {**own, **(metrics.get("trait") or {})}


def indices_of(metrics: Mapping[str, Any]) -> dict[str, int]:
    """Name of an arm -> its number, which chooses its colour."""
    return {str(arm["name"]): i for i, arm in enumerate(metrics.get("arms") or [])}


def spoken(metrics: Mapping[str, Any], text: Any) -> str:
    """A sentence of the analysis with the names of outcomes as words."""
    said = str(text or "")
    arms = indices_of(metrics)
    for name in metrics.get("outcomes") or {}:
        if name not in arms:
            said = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", readable(name).replace("\\", r"\\"), said)
    return said


# ---- head


def seeds_of(metrics: Mapping[str, Any]) -> list[Any]:
    """Seeds behind the primary contrast."""
    return list((metrics.get("question") or {}).get("seeds") or (metrics.get("design") or {}).get("seeds") or [])


def lock_of(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """What became of the locked question; empty without one."""
    return (metrics.get("design") or {}).get("lock") or {}


def badges(metrics: Mapping[str, Any]) -> list[Badge]:
    """Confirmatory or exploratory, and whether the answer is about items only."""
    lock = lock_of(metrics)
    if lock.get("confirmatory"):
        found = [Badge(f"Confirmatory: locked {moment(lock.get('locked'))}, unchanged", "good")]
    elif lock.get("locked"):
        found = [Badge(f"Exploratory: locked {moment(lock['locked'])}, then deviated from", "warn")]
    else:
        found = [Badge("Exploratory: the question was not locked")]
    seeds = seeds_of(metrics)
    if (metrics.get("design") or {}).get("trained") is False:
        found.append(Badge("Items only: no arm was trained"))
    elif len(seeds) == 1:
        found.append(Badge("Items only: one seed", "warn"))
    elif seeds:
        found.append(Badge(f"{(metrics.get('question') or {}).get('items', 'Its')} items \N{MULTIPLICATION SIGN} {len(seeds)} seeds"))
    return found


def decided_by(metrics: Mapping[str, Any]) -> str:
    """The one test behind the verdict, as a sentence."""
    contrasts = metrics.get("contrasts") or []
    return spoken(metrics, contrasts[0].get("verdict")) if contrasts and contrasts[0].get("role") == "primary" else ""


# ---- tables


def arm_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each arm, a column for each outcome."""
    outcomes = list(metrics.get("outcomes") or {})
    columns = [_column(metrics, outcome) for outcome in outcomes]
    cells = [arm_cells(metrics, outcome) for outcome in outcomes]
    rows = [
        {
            "index": i,
            "name": str(arm["name"]),
            "label": str(arm.get("label") or ""),
            "steering": treated(arm),
            "cells": [of_outcome[i] for of_outcome in cells],
        }
        for i, arm in enumerate(metrics.get("arms") or [])
    ]
    return {"columns": columns, "rows": rows}


def _column(metrics: Mapping[str, Any], outcome: str) -> dict[str, str]:
    words = metrics["outcomes"][outcome]
    what = "change" if is_change(metrics, outcome) else "mean"
    return {
        "name": readable(outcome).capitalize(),
        "unit": words.get("unit") or "",
        "what": what,
        "better": words.get("reading") or better_label(metrics, outcome),
        "role": words.get("role") or "",
        "meaning": words.get("meaning") or "",
    }


def treated(arm: Mapping[str, Any]) -> str:
    """What was done in an arm, and when, in words."""
    treatment = arm.get("treatment") or {}
    when = WHEN.get(str(arm.get("when") or "never"), str(arm.get("when")))
    if arm.get("when") == "never":
        return when
    what = str(treatment.get("what") or treatment.get("kind") or "treated")
    control = f"{arm.get('draws', 1)} matched random draws of " if arm.get("control_of") and arm.get("draws", 1) > 1 else ""
    return f"{control}{what}; {when}"


def arm_cells(metrics: Mapping[str, Any], outcome: str) -> list[Cell | None]:
    """One outcome of every arm; None for an arm that lacks it."""
    rows = arm_rows(metrics, outcome)
    signed = is_change(metrics, outcome)
    estimates = [(row.value, [row.low, row.high]) for row in rows]
    digits = common_digits(estimates)
    has = [bool((arm.get("outcomes") or {}).get(outcome)) for arm in metrics.get("arms") or []]
    places = forest(estimates)
    return [_cell(row, place, signed, digits) if there else None for row, place, there in zip(rows, places, has, strict=True)]


def _cell(row: ArmRow, place: Forest | None, signed: bool, digits: int | None) -> Cell:
    bounds = interval([row.low, row.high], signed=signed, digits=digits)
    before = number(row.before, digits=digits) if signed else ""
    return Cell(number(row.value, signed=signed, digits=digits), bounds, before, number(row.mean, digits=digits), place, row.holds_for)


def contrast_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Contrasts with their words; the forests of one outcome share a scale."""
    contrasts = metrics.get("contrasts") or []
    rows: list[dict[str, Any] | None] = [None] * len(contrasts)
    for outcome in dict.fromkeys(str(each.get("metric")) for each in contrasts):
        places = [i for i, each in enumerate(contrasts) if str(each.get("metric")) == outcome]
        estimates = [(contrasts[i].get("difference"), contrasts[i].get("ci")) for i in places]
        digits, scale = common_digits(estimates), forest(estimates)
        for i, place in zip(places, scale, strict=True):
            rows[i] = _contrast_row(metrics, contrasts[i], digits, place)
    return [row for row in rows if row is not None]


def _contrast_row(metrics: Mapping[str, Any], each: Mapping[str, Any], digits: int | None, place: Forest | None) -> dict[str, Any]:
    level = each.get("level")
    return {
        "a": str(each.get("a")),
        "b": str(each.get("b")),
        "outcome": axis_label(metrics, str(each.get("metric"))),
        "role": str(each.get("role") or ""),
        "difference": number(each.get("difference"), signed=True, digits=digits),
        "ci": interval(each.get("ci"), signed=True, digits=digits),
        "level": f"{100 * level:.3g}\N{NARROW NO-BREAK SPACE}%" if measured(level) else "95\N{NARROW NO-BREAK SPACE}%, not corrected",
        "p": p_value(each.get("p_adjusted", each.get("p"))),
        "correction": str(each.get("correction") or "none"),
        "shown": each.get("shown"),
        "verdict": spoken(metrics, each.get("verdict")),
        "n": number(each.get("n"), digits=0),
        "seeds": number(each.get("seeds"), digits=0),
        "forest": place,
    }


def forest(estimates: Sequence[tuple[Any, Any]]) -> list[Forest | None]:
    """Places of estimates and their intervals on one scale that holds all of them and zero."""
    ends = [0.0]
    for value, ci in estimates:
        if measured(value):
            ends += [value, *(ci if is_interval(ci) else ())]
    low = min(ends)
    high = max(ends)
    if low == high:
        return [None] * len(estimates)

    def place(x: float) -> float:
        return round(4 + 92 * (x - low) / (high - low), 2)

    def places(value: Any, ci: Any) -> Forest | None:
        if not measured(value):
            return None
        ends = (place(ci[0]), place(ci[1])) if is_interval(ci) else (None, None)
        return Forest(place(0.0), place(value), *ends)

    return [places(value, ci) for value, ci in estimates]


# ---- training


def training_losses(metrics: Mapping[str, Any]) -> list[tuple[str, int, list[float]]]:
    """Name, number and mean loss by step of every trained arm; runs that are shorter than the longest are left out of the mean."""
    indices = indices_of(metrics)
    runs: dict[str, list[list[float]]] = {}
    for name, training in (metrics.get("training") or {}).items():
        loss = [float("nan") if x is None else float(x) for x in training.get("loss") or ()]
        if loss:
            runs.setdefault(str(training.get("arm") or name), []).append(loss)
    means = []
    for arm, losses in runs.items():
        longest = [loss for loss in losses if len(loss) == max(map(len, losses))]
        count = f", mean of {len(longest)} runs" if len(longest) > 1 else ""
        means.append((f"{arm}{count}", indices.get(arm, len(indices)), np.mean(longest, axis=0).tolist()))
    return means


def training_costs(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps, seconds and overhead of every trained arm, over its runs."""
    indices, overhead = indices_of(metrics), metrics.get("overhead") or {}
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for name, training in (metrics.get("training") or {}).items():
        runs.setdefault(str(training.get("arm") or name), []).append(training)
    return [
        {
            "label": arm,
            "index": indices.get(arm, len(indices)),
            "runs": len(of_arm),
            "steps": of_arm[0].get("steps", "not recorded"),
            "seconds": _middle([training["seconds"] for training in of_arm if measured(training.get("seconds"))]),
            "overhead": overhead.get(arm) or {},
        }
        for arm, of_arm in runs.items()
    ]


def _middle(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


# ---- the rest


def guardrail_rows(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Guardrails that were measured."""
    return [each for each in metrics.get("guardrails") or [] if measured(each.get("harm")) and measured(each.get("margin"))]


def primary_better(metrics: Mapping[str, Any]) -> str | None:
    """`higher` or `lower`: which way the primary outcome is better."""
    outcome = primary_outcome(metrics)
    return (metrics["outcomes"][outcome]).get("better") if outcome else None
