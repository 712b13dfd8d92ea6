"""Features of dictionaries for the drift section of the page: a table of all, figures of those that moved most, and their dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer.drift.records import DriftRecord
from steer.report.curves import DriftCurve, chance_bound
from steer.report.numbers import number, p_value

LISTED = 30  # rows of the table; all are in the drift store
DRAWN = 4  # features with a figure


def feature_rows(curves: Sequence[DriftCurve]) -> list[dict[str, Any]]:
    """A row for each feature, run and mode at the last step, that which moved most against random features first."""
    runs = [(curve, arm.arm, run) for curve in curves for arm in curve.arms for run in arm.runs]
    rows = []
    for curve, arm, run in sorted(runs, key=lambda each: -_strength(each[2].last)):
        last = run.last
        beyond = run.beyond(len(runs))
        rows.append(
            {
                "feature": curve.direction,
                "site": curve.site,
                "mode": curve.mode,
                "arm": arm,
                "run": run.name,
                "density": _share(last.density),
                "density_before": _share(last.density - last.density_change),
                "change": number(last.change, signed=True, digits=3),
                "interval": f"{number(last.change_low, signed=True, digits=3)} to {number(last.change_high, signed=True, digits=3)}",
                "effect": number(last.effect_sd, signed=True, digits=2),
                "z_controls": number(last.z_controls, signed=True, digits=1),
                "p": p_value(last.q),
                "verdict": {True: "beyond chance", False: "within chance", None: "not comparable"}[beyond],
                "beyond": bool(beyond),
            }
        )
    return rows


def bound_words(curves: Sequence[DriftCurve]) -> str:
    """The |z| above which a feature is beyond chance, for each number of random features."""
    runs = [run for curve in curves for arm in curve.arms for run in arm.runs]
    bounds = {chance_bound(run.controls, len(runs)) for run in runs if run.controls}
    return " or ".join(number(bound, digits=1) for bound in sorted(bounds))


def most_moved(curves: Sequence[DriftCurve]) -> list[DriftCurve]:
    """The curves of the features that moved most against random ones, in any run."""
    return sorted(curves, key=lambda curve: -max(_strength(run.last) for arm in curve.arms for run in arm.runs))[:DRAWN]


def dictionary_rows(drift: Mapping[str, Sequence[DriftRecord]], arms: Mapping[str, str]) -> list[dict[str, Any]]:
    """How well each dictionary explains the model at the last step of each run and mode."""
    last: dict[tuple[str, str, str, str], DriftRecord] = {}
    for run, records in drift.items():
        for record in records:
            key = (record.direction, record.site, record.mode, run)
            if record.kind == "dictionary" and (key not in last or record.step >= last[key].step):
                last[key] = record
    return [
        {
            "name": name,
            "site": site,
            "mode": mode,
            "arm": arms.get(run, run),
            "run": run,
            "fvu": number(record.fvu, digits=3),
            "fvu_before": number(record.fvu - record.fvu_change, digits=3),
            "l0": number(record.l0, digits=1),
            "l0_before": number(record.l0 - record.l0_change, digits=1),
            "silent": _share(record.silent),
        }
        for (name, site, mode, run), record in sorted(last.items())
    ]


def _share(share: float) -> str:
    return f"{number(100 * share, digits=2)} %"


def _strength(record: DriftRecord) -> float:
    z = record.z_controls
    return abs(z) if z is not None and math.isfinite(z) else -1.0
