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
from steer.errors import ConfigError

BAND = 0.90
LEVEL = 0.95
UNITS = {"sd": "baseline SD", "gap": "class gaps"}


@dataclass(frozen=True)
class ArmCurve:
    """One arm of a curve; the arrays have one entry per measured step.

    Attributes:
        steps: [m] optimiser steps, ascending.
        effect: [m] shift of the named direction in the curve's unit; nan where undefined.
        band: [m] half-width of the interval about 0 that holds `BAND` of the control directions; nan without controls.
        controls: number of control directions.
        records: [m] of the named direction.
    """

    arm: str
    steps: np.ndarray
    effect: np.ndarray
    band: np.ndarray
    controls: int
    records: tuple[DriftRecord, ...]

    @property
    def last(self) -> DriftRecord:
        """The latest measurement."""
        return self.records[-1]

    def beyond(self, looks: int) -> bool | None:
        """Whether the latest |z_controls| is above `chance_bound`; None where one of them is missing."""
        z = self.last.z_controls
        if z is None or not self.controls or not math.isfinite(z) or not math.isfinite(self.effect[-1]):
            return None
        return abs(z) > chance_bound(self.controls, looks)


@dataclass(frozen=True)
class DriftCurve:
    """One direction at one site, read in one mode, in all arms that have records of it."""

    direction: str
    site: str
    mode: str
    unit: str
    arms: tuple[ArmCurve, ...]


def chance_bound(controls: int, looks: int) -> float:
    """|z_controls| that one of `looks` random directions exceeds in one of twenty cases (Bonferroni).

    A shift over the root mean square of `controls` equally distributed ones has Student's t distribution with that many degrees of freedom:
    2.1 for 16 controls and one look.
    """
    return float(student.ppf(1 - (1 - LEVEL) / (2 * max(looks, 1)), controls))


def drift_curves(drift: Mapping[str, Sequence[DriftRecord]], *, unit: str = "sd") -> list[DriftCurve]:
    """Curves of every named direction, sites in the order of the layers.

    The sign of a random direction is arbitrary, so the band is symmetric: the quantile of the controls' absolute shift.

    Args:
        drift: records by arm.
        unit: `sd`, every direction in its own baseline SD; `gap`, all of them in class gaps of the named direction.

    Raises:
        ConfigError: an unknown unit.
    """
    if unit not in UNITS:
        raise _unknown_unit(unit)
    named: dict[tuple[str, str, str], dict[str, list[DriftRecord]]] = defaultdict(lambda: defaultdict(list))
    controls: dict[tuple[str, str, str, int], list[DriftRecord]] = defaultdict(list)
    for arm, records in drift.items():
        for record in records:
            if record.kind == "control":
                controls[arm, record.site, record.mode, record.step].append(record)
            else:
                named[record.direction, record.site, record.mode][arm].append(record)
    curves = [
        DriftCurve(*key, unit, tuple(_arm_curve(arm, records, controls, unit) for arm, records in arms.items()))
        for key, arms in named.items()
    ]
    return sorted(curves, key=lambda curve: (curve.direction, curve.mode, natural(curve.site)))


def _arm_curve(
    arm: str, records: list[DriftRecord], controls: Mapping[tuple[str, str, str, int], list[DriftRecord]], unit: str
) -> ArmCurve:
    """Records of one named direction in one arm, beside the controls of the same site, mode and step."""
    ordered = sorted(records, key=lambda record: record.step)
    controls_by_step = [controls.get((arm, record.site, record.mode, record.step), []) for record in ordered]
    gap = _gap(ordered) if unit == "gap" else None
    return ArmCurve(
        arm,
        np.array([record.step for record in ordered]),
        np.array([_effect(record, gap) for record in ordered]),
        np.array([_band([_effect(control, gap) for control in of_step]) for of_step in controls_by_step]),
        max(map(len, controls_by_step)),
        tuple(ordered),
    )


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
