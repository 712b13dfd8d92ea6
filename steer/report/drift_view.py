"""Drift for the page: a figure for each direction, site and mode, that of the site that matters first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from steer.drift.records import DriftRecord
from steer.report import numbers, palette
from steer.report.canvas import both_widths
from steer.report.curves import BAND, ArmCurve, DriftCurve, Run, chance_bound, drift_curves
from steer.report.drift_plot import draw_drift
from steer.report.feature_view import LISTED, bound_words, dictionary_rows, feature_rows, most_moved
from steer.report.numbers import number
from steer.report.view import indices_of

STEERED_HERE = {"train": "steered here in training", "inference": "steered here at inference", "both": "steered here throughout"}
MISSING = (math.nan, math.nan)


def drift_content(metrics: Mapping[str, Any], drift: Mapping[str, Sequence[DriftRecord]], markup: Any) -> dict[str, Any]:
    """The curves with their tables: `main` at the site that matters, `others` folded."""
    arms = {name: str(training.get("arm") or name) for name, training in (metrics.get("training") or {}).items()}
    every = drift_curves(drift, arms=arms)
    curves = [curve for curve in every if curve.thing == "direction"]
    looks = sum(len(arm.runs) for curve in curves for arm in curve.arms)
    bounds = {chance_bound(run.controls, looks) for curve in curves for arm in curve.arms for run in arm.runs if run.controls}
    site = chosen_site(metrics, [curve.site for curve in curves])
    content = [curve_content(curve, i, metrics, looks, markup) for i, curve in enumerate(curves)]
    features = [curve for curve in every if curve.thing == "feature"]
    main = [each for each in content if each["site"] == site]
    return {
        "main": main,
        "others": [each for each in content if each not in main],
        "band": numbers.percentage(BAND),
        "looks": looks,
        "bound": " or ".join(number(bound, digits=1) for bound in sorted(bounds)),
        "features": _features(features, len(curves), metrics, markup),
        "dictionaries": dictionary_rows(drift, arms),
    }


def _features(curves: Sequence[DriftCurve], first: int, metrics: Mapping[str, Any], markup: Any) -> dict[str, Any]:
    """Features that are tracked: the table, and figures of those that moved most. first: number of the first figure."""
    rows = feature_rows(curves)
    figures = [curve_content(curve, i, metrics, len(rows), markup) for i, curve in enumerate(most_moved(curves), first)]
    return {"rows": rows[:LISTED], "count": len(rows), "bound": bound_words(curves), "curves": figures}


def chosen_site(metrics: Mapping[str, Any], tracked: Sequence[str]) -> str | None:
    """The site that matters: where the arm of the primary contrast acts, that of the trait, or the first that was tracked."""
    primary = (metrics.get("question") or {}).get("primary") or {}
    treatment: Mapping[str, Any] = next(
        (arm.get("treatment") or {} for arm in metrics.get("arms") or [] if arm["name"] == primary.get("arm")), {}
    )
    trait = metrics.get("trait") or ((metrics.get("config") or {}).get("experiment") or {}).get("trait") or {}
    named = [site for site in tracked if acts_at(treatment, site)]
    return next(iter([*named, *(site for site in tracked if site == trait.get("site")), *tracked]), None)


def acts_at(treatment: Mapping[str, Any], site: str) -> bool:
    """A treatment says that it acts at a site; `layers.1.output` is no part of `layers.1.output2` or `layers.11.output`."""
    return re.search(rf"(?<![\w.]){re.escape(site)}(?![\w.]*\w)", str(treatment.get("what") or "")) is not None


def curve_content(curve: DriftCurve, index: int, metrics: Mapping[str, Any], looks: int, markup: Any) -> dict[str, Any]:
    """One figure of drift with its tables: the last step in short, every number of it, and every step."""
    indices = indices_of(metrics)
    names = {name: name for name in indices}
    at_site = {
        str(arm["name"]): str(arm.get("when")) for arm in metrics.get("arms") or [] if acts_at(arm.get("treatment") or {}, curve.site)
    }
    notes = {name: STEERED_HERE.get(when, "") for name, when in at_site.items()}
    last = [_last_step(arm, indices, looks) for arm in curve.arms]
    steps = sorted({int(step) for arm in curve.arms for step in arm.steps})
    by_step = [dict(zip(arm.steps.tolist(), zip(arm.effect.tolist(), arm.band.tolist(), strict=True), strict=True)) for arm in curve.arms]
    title = f"{curve.direction} at {curve.site}, {curve.mode} mode"
    description = f"Shift in baseline SD at the last measured step. {' '.join(_sentence(row) for row in last)}"
    svg = both_widths(draw_drift, curve, names, notes, key=f"drift-{index}", title=f"Drift of {title}", description=description)
    return {
        "title": title,
        "thing": curve.thing,
        "direction": curve.direction,
        "site": curve.site,
        "mode": curve.mode,
        "first_window": steps[0] if curve.mode == "stream" and steps else None,
        "steered": any(notes.values()),
        "svg": markup(svg),
        "last": last,
        "runs": [_run_row(run, arm.arm, looks) for arm in curve.arms for run in arm.runs],
        "steps": [{"step": step, "cells": [_shift_and_band(of_arm.get(step, MISSING)) for of_arm in by_step]} for step in steps],
    }


def _shift_and_band(values: tuple[float, float]) -> tuple[str, str]:
    return number(values[0], signed=True, digits=2), number(values[1], digits=2)


def _last_step(arm: ArmCurve, indices: Mapping[str, int], looks: int) -> dict[str, Any]:
    beyond, compared = arm.beyond(looks)
    if not compared:
        verdict = "not comparable"
    elif compared == 1:
        verdict = "beyond chance" if beyond else "within chance"
    else:
        verdict = f"beyond chance in {beyond} of {compared} runs"
    return {
        "label": arm.arm,
        "index": indices.get(arm.arm, len(indices)) % len(palette.ARMS),
        "step": int(arm.steps[-1]),
        "effect": number(float(arm.effect[-1]), signed=True, digits=2),
        "verdict": verdict,
        "beyond": beyond > 0,
    }


def _run_row(run: Run, label: str, looks: int) -> dict[str, Any]:
    """Every number of the last step of one run."""
    record = run.last
    return {
        "label": label,
        "run": run.name,
        "step": record.step,
        "n": number(record.n, digits=0),
        "effect": number(record.effect_sd, signed=True, digits=2),
        "gap": number(record.effect_gap, signed=True, digits=2),
        "band": number(float(run.band[-1]), digits=2),
        "p": numbers.p_value(record.q),
        "z_controls": number(record.z_controls, signed=True, digits=1),
        "z_isotropic": number(record.z_isotropic, signed=True, digits=1),
        "verdict": {True: "beyond chance", False: "within chance", None: "not comparable"}[run.beyond(looks)],
    }


def _sentence(row: Mapping[str, Any]) -> str:
    return f"{row['label']}: {row['effect']} at step {row['step']}, {row['verdict']}."
