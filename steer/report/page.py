"""One self-contained HTML page from metrics and drift records. It loads nothing: a content security policy inside it forbids that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from steer.drift.records import DriftRecord
from steer.files import atomic_write
from steer.report import drift_plot, numbers, palette, run_plots, view
from steer.report.canvas import inline_svg
from steer.report.caveats import caveats
from steer.report.curves import BAND, ArmCurve, DriftCurve, chance_bound, drift_curves, natural
from steer.report.extra import extra
from steer.report.numbers import number

STEERED_HERE = {"train": "steered here in training", "inference": "steered here at inference"}


def write_report(path: str | Path, metrics: Mapping[str, Any], drift: Mapping[str, Sequence[DriftRecord]]) -> Path:
    """Writes the report of a run.

    Args:
        path: of the HTML file; its folder is made, and an existing file is replaced as a whole.
        metrics: the content of metrics.json.
        drift: records by name of the arm; may be empty.

    Raises:
        ConfigError: matplotlib or jinja2 is missing. WrongKindError: metrics of another schema. StorageFullError.
    """
    room = files("steer.report")
    environment = extra("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(numbers, name) for name in ("number", "overhead", "duration", "moment")}
    markup = extra("markupsafe").Markup
    page = environment.from_string((room / "template.html").read_text(encoding="utf-8")).render(
        style=markup(f"{palette.css()}\n{(room / 'style.css').read_text(encoding='utf-8')}"),
        **_content(view.checked(metrics), drift, markup),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return path


def _content(metrics: Mapping[str, Any], drift: Mapping[str, Sequence[DriftRecord]], markup: Any) -> dict[str, Any]:
    arms = metrics.get("arms") or []
    labels = {arm["name"]: str(arm.get("label") or arm["name"]) for arm in arms}
    columns = view.metric_columns(arms)
    cells = [view.arm_cells(arms, key) for key in columns]
    curves = drift_curves(drift)
    looks = sum(len(curve.arms) for curve in curves)
    bounds = {chance_bound(arm.controls, looks) for curve in curves for arm in curve.arms if arm.controls}
    trait = metrics.get("trait") or {}
    return {
        "metrics": metrics,
        "model": metrics.get("model") or {},
        "trait": trait,
        "specificity": metrics.get("specificity") or {},
        "compared": view.compared(metrics, labels),
        "columns": list(columns.values()),
        "arms": [
            {
                "index": i % len(palette.ARMS),
                "label": labels[arm["name"]],
                "steering": view.steering(arm.get("steer")),
                "cells": [of_metric[i] for of_metric in cells],
                "train": arm.get("train") or {},
            }
            for i, arm in enumerate(arms)
        ],
        "comparisons": view.comparison_groups(metrics, labels),
        "curves": [_curve(curve, i, arms, labels, looks, markup) for i, curve in enumerate(curves)],
        "band": numbers.percentage(BAND),
        "looks": looks,
        "bound": " or ".join(number(bound, digits=1) for bound in sorted(bounds)),
        "separation": _separation(trait, markup),
        "losses": _losses(arms, labels, markup),
        "completions": view.completion_rows(metrics, labels),
        "caveats": caveats(metrics, drift),
    }


def _curve(
    curve: DriftCurve, index: int, arms: Sequence[Mapping[str, Any]], labels: Mapping[str, str], looks: int, markup: Any
) -> dict[str, Any]:
    """One figure of drift with its two tables: the last step in full, and every step."""
    steered = {arm["name"]: arm["steer"]["when"] for arm in arms if (arm.get("steer") or {}).get("site") == curve.site}
    notes = {name: STEERED_HERE.get(when, "") for name, when in steered.items()}
    order = list(labels)
    last = [_last_step(arm, labels, order, looks) for arm in curve.arms]
    steps = sorted({int(step) for arm in curve.arms for step in arm.steps})
    by_step = [dict(zip(arm.steps.tolist(), zip(arm.effect.tolist(), arm.band.tolist(), strict=True), strict=True)) for arm in curve.arms]
    title = f"{curve.direction} at {curve.site}, {curve.mode} mode"
    description = f"Shift in baseline SD at the last measured step. {' '.join(_sentence(row) for row in last)}"
    svg = inline_svg(drift_plot.draw_drift, curve, labels, notes, key=f"drift-{index}", title=f"Drift of {title}", description=description)
    missing = (math.nan, math.nan)
    return {
        "title": title,
        "direction": curve.direction,
        "site": curve.site,
        "mode": curve.mode,
        "first_window": steps[0] if curve.mode == "stream" else None,
        "steered": any(notes.values()),
        "svg": markup(svg),
        "last": last,
        "steps": [{"step": step, "cells": [_shift_and_band(of_arm.get(step, missing)) for of_arm in by_step]} for step in steps],
    }


def _shift_and_band(values: tuple[float, float]) -> tuple[str, str]:
    return number(values[0], signed=True, digits=2), number(values[1], digits=2)


def _last_step(arm: ArmCurve, labels: Mapping[str, str], order: Sequence[str], looks: int) -> dict[str, Any]:
    record = arm.last
    beyond = arm.beyond(looks)
    return {
        "label": labels.get(arm.arm, arm.arm),
        "index": (order.index(arm.arm) if arm.arm in order else len(order)) % len(palette.ARMS),
        "step": record.step,
        "n": number(record.n, digits=0),
        "effect": number(float(arm.effect[-1]), signed=True, digits=2),
        "gap": number(record.effect_gap, signed=True, digits=2),
        "band": number(float(arm.band[-1]), digits=2),
        "p": numbers.p_value(record.q),
        "z_controls": number(record.z_controls, signed=True, digits=1),
        "z_isotropic": number(record.z_isotropic, signed=True, digits=1),
        "banded": math.isfinite(arm.band[-1]),
        "verdict": {True: "beyond chance", False: "within chance", None: "not comparable"}[beyond],
        "beyond": beyond,
    }


def _sentence(row: Mapping[str, Any]) -> str:
    return f"{row['label']}: {row['effect']} at step {row['step']}, {row['verdict']}."


def _separation(trait: Mapping[str, Any], markup: Any) -> dict[str, Any] | None:
    """Held-out AUC by site, as a figure and as rows; None when it was not measured anywhere."""
    auc = {site: float(value) for site, value in (trait.get("auc_by_site") or {}).items() if numbers.measured(value)}
    if not auc:
        return None
    rows = [(site, number(auc[site], digits=3)) for site in sorted(auc, key=natural)]
    used = trait.get("site")
    worst = number(min(auc.values()), digits=3)
    best = number(max(auc.values()), digits=3)
    description = f"From {worst} to {best} over {len(auc)} sites; 0.5 is chance. Site used: {used or 'not recorded'}."
    svg = inline_svg(run_plots.draw_separation, auc, used, key="auc", title="Held-out AUC by site", description=description)
    return {"svg": markup(svg), "rows": rows}


def _losses(arms: Sequence[Mapping[str, Any]], labels: Mapping[str, str], markup: Any) -> dict[str, Any] | None:
    """Training losses as a figure with a table of first and last values; None when no arm has any."""
    runs = view.training_losses(arms, labels)
    if not runs:
        return None
    rows = [(label, len(loss), *(number(float(x)) for x in _ends(loss))) for label, _, loss in runs]
    description = " ".join(f"{label}: from {first} to {last} in {steps} steps." for label, steps, first, last in rows)
    svg = inline_svg(run_plots.draw_losses, runs, key="loss", title="Training loss by arm", description=description)
    return {"svg": markup(svg), "rows": rows, "width": max(run_plots.running_width(len(loss)) for _, _, loss in runs)}


def _ends(loss: Sequence[float]) -> tuple[float, float]:
    """First and last value of the running mean."""
    smooth = run_plots.running_mean(loss, run_plots.running_width(len(loss)))
    return smooth[0], smooth[-1]
