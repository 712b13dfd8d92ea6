"""Drift records as curves: one per direction, site and mode, all arms beside the random directions of the same site."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from steer.drift.records import DriftRecord
from steer.drift.site_directions import CONTROLS
from steer.errors import ConfigError

BAND = 0.90
LEVEL = 0.95
Controls = Mapping[tuple[str, str, str, int, str], list[DriftRecord]]
UNITS = {"sd": "baseline SD", "gap": "class gaps"}


@dataclass(frozen=True)
class Run:
    """One training run of an arm: its seed and, of a control, its draw.

    Attributes:
        name: of the cell, or of the arm where it was trained once.
        effect: [m] shift of the named direction in the curve's unit; nan where undefined or not measured.
        band: [m] half-width of the interval about 0 that holds `BAND` of the control directions; nan without controls.
        controls: number of control directions.
        last: the latest record of the named direction.
    """

    name: str
    effect: np.ndarray
    band: np.ndarray
    controls: int
    last: DriftRecord

    def beyond(self, looks: int) -> bool | None:
        """Whether the latest |z_controls| is above `chance_bound`; None where one of them is missing."""
        z = self.last.z_controls
        if z is None or not self.controls or not math.isfinite(z) or not math.isfinite(self.last.effect_sd):
            return None
        return abs(z) > chance_bound(self.controls, looks)


@dataclass(frozen=True)
class ArmCurve:
    """One arm of a curve.

    Attributes:
        steps: [m] optimiser steps at which any of its runs was measured, ascending.
        runs: its training runs.
    """

    arm: str
    steps: np.ndarray
    runs: tuple[Run, ...]

    @property
    def effect(self) -> np.ndarray:
        """[m] mean over the runs."""
        return _mean([run.effect for run in self.runs])

    @property
    def band(self) -> np.ndarray:
        """[m] mean over the runs."""
        return _mean([run.band for run in self.runs])

    @property
    def controls(self) -> int:
        """Number of control directions."""
        return max(run.controls for run in self.runs)

    def beyond(self, looks: int) -> tuple[int, int]:
        """Runs beyond chance, and runs that can be compared with it."""
        found = [run.beyond(looks) for run in self.runs]
        return found.count(True), len(found) - found.count(None)


@dataclass(frozen=True)
class DriftCurve:
    """One direction or feature at one site, read in one mode, in all arms that have records of it."""

    direction: str
    site: str
    mode: str
    unit: str
    arms: tuple[ArmCurve, ...]

    @property
    def thing(self) -> str:
        """`direction` or `feature`."""
        return "feature" if self.arms[0].runs[0].last.kind == "feature" else "direction"


def chance_bound(controls: int, looks: int) -> float:
    """|z_controls| that one of `looks` random directions exceeds in one of twenty cases (Bonferroni).

    A shift over the root mean square of `controls` equally distributed ones has Student's t distribution with that many degrees of freedom:
    2.1 for 16 controls and one look.
    """
    return float(student.ppf(1 - (1 - LEVEL) / (2 * max(looks, 1)), controls))


def drift_curves(
    drift: Mapping[str, Sequence[DriftRecord]], *, unit: str = "sd", arms: Mapping[str, str] | None = None
) -> list[DriftCurve]:
    """Curves of every named direction and feature, sites in the order of the layers.

    The sign of a random direction is arbitrary, so the band is symmetric: the quantile of the controls' absolute shift.

    Args:
        drift: records by training run.
        unit: `sd`, every direction in its own baseline SD; `gap`, all of them in class gaps of the named direction.
        arms: the arm of each run; a run that is not named there is an arm by itself.

    Raises:
        ConfigError: an unknown unit.
    """
    if unit not in UNITS:
        raise _unknown_unit(unit)
    named: dict[tuple[str, str, str], dict[str, list[DriftRecord]]] = defaultdict(lambda: defaultdict(list))
    controls: dict[tuple[str, str, str, int, str], list[DriftRecord]] = defaultdict(list)
    for run, records in drift.items():
        for record in records:
            if record.kind in CONTROLS:
                controls[run, record.site, record.mode, record.step, _group(record)].append(record)
            elif record.kind != "dictionary":  # which has no shift
                named[record.direction, record.site, record.mode][run].append(record)
    arm_of = {run: (arms or {}).get(run, run) for run in drift}
    curves = [
        DriftCurve(*key, unit, tuple(_arm_curve(arm, runs, controls, unit) for arm, runs in _by_arm(of_run, arm_of).items()))
        for key, of_run in named.items()
    ]
    return sorted(curves, key=lambda curve: (curve.direction, curve.mode, natural(curve.site)))


def _group(record: DriftRecord) -> str:
    """What a record shares with its controls beside the site: the name of a group of features; nothing of directions."""
    return record.direction.rpartition("/")[0] if record.kind in ("feature", "feature_control") else ""


def _by_arm(of_run: Mapping[str, list[DriftRecord]], arm_of: Mapping[str, str]) -> dict[str, dict[str, list[DriftRecord]]]:
    by_arm: dict[str, dict[str, list[DriftRecord]]] = {}
    for run, records in of_run.items():
        by_arm.setdefault(arm_of[run], {})[run] = sorted(records, key=lambda record: record.step)
    return by_arm


def _arm_curve(
    arm: str,
    runs: Mapping[str, list[DriftRecord]],
    controls: Controls,
    unit: str,
) -> ArmCurve:
    """Records of one named direction in one arm, beside the controls of the same run, site, mode and step."""
    steps = sorted({record.step for records in runs.values() for record in records})
    return ArmCurve(arm, np.array(steps), tuple(_run(name, records, steps, controls, unit) for name, records in runs.items()))


def _run(
    name: str,
    records: list[DriftRecord],
    steps: Sequence[int],
    controls: Controls,
    unit: str,
) -> Run:
    by_step = {record.step: record for record in records}
    of_step = {step: controls.get((name, record.site, record.mode, step, _group(record)), []) for step, record in by_step.items()}
    gap = _gap(records) if unit == "gap" else None
    return Run(
        name,
        np.array([_effect(by_step[step], gap) if step in by_step else math.nan for step in steps]),
        np.array([_band([_effect(control, gap) for control in of_step.get(step, [])]) for step in steps]),
        max(map(len, of_step.values())),
        records[-1],
    )


def _mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[runs, m] -> [m], over the runs that were measured; nan where none was."""
    table = np.stack(rows)
    counts = np.isfinite(table).sum(0)
    return np.where(counts > 0, np.where(np.isfinite(table), table, 0).sum(0) / np.maximum(counts, 1), math.nan)


def _gap(records: list[DriftRecord]) -> float:
    """Class gap of a named direction in units of the activation, read back from its own records."""
    return next((r.change / r.effect_gap for r in records if r.effect_gap and math.isfinite(r.effect_gap)), math.nan)


def _effect(record: DriftRecord, gap: float | None) -> float:
    return record.effect_sd if gap is None else record.change / gap


def _band(effects: list[float]) -> float:
    finite = [abs(effect) for effect in effects if math.isfinite(effect)]
    return float(np.quantile(finite, BAND)) if finite else math.nan


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _unknown_unit(unit: str) -> ConfigError:
    remedy = "choose sd (baseline standard deviations) or gap (class gaps)"
    return ConfigError(f"unknown unit of drift '{unit}'", expected=" or ".join(UNITS), found=unit, remedy=remedy)
