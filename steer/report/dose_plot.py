"""Dose and response: every outcome of a strength sweep over the strength, with the control draws that were swept along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.canvas import hover, is_narrow, new_figure
from steer.report.extra import extra
from steer.report.numbers import estimate, is_interval, measured, number
from steer.report.palette import ARMS, DASHES, LIGHT
from steer.report.rows import axis_label, better_label

COLUMNS = 2

Lines = Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]  # arm -> strengths and values of one outcome


def sweep_outcomes(metrics: Mapping[str, Any]) -> list[str]:
    """Outcomes that any strength of the sweep has, in their order in the tree."""
    swept = {name for point in metrics.get("sweep") or [] for name in point.get("outcomes") or {}}
    return [name for name in metrics.get("outcomes") or {} if name in swept]


def sweep_lines(metrics: Mapping[str, Any], outcome: str) -> Lines:
    """Arm -> strengths, ascending, and values of one outcome. A sweep of one arm may leave its name out."""
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for point in metrics.get("sweep") or []:
        values = (point.get("outcomes") or {}).get(outcome)
        if values and measured(values.get("mean")):
            lines.setdefault(str(point.get("arm") or "edit"), []).append((float(point["strength"]), values))
    return {arm: sorted(line, key=lambda each: each[0]) for arm, line in lines.items()}


def draw_sweep(metrics: Mapping[str, Any], width: float) -> Any:
    """A panel for each outcome over a common axis of strengths."""
    outcomes = sweep_outcomes(metrics)
    columns = 1 if is_narrow(width) else min(COLUMNS, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    figure = new_figure(width if columns > 1 else min(width, 6.4), 2.7 * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for ax, outcome in zip(axes.flat, outcomes, strict=False):
        _draw_outcome(ax, metrics, outcome, sweep_lines(metrics, outcome))
    for ax in axes.flat[len(outcomes) :]:
        ax.set_axis_off()
    unit = next((point["unit"] for point in metrics["sweep"] if point.get("unit")), "")
    for ax in axes.flat[max(0, len(outcomes) - columns) : len(outcomes)]:
        ax.set_xlabel(f"strength{f', {unit}' if unit else ''}")
        ax.tick_params(labelbottom=True)
    handles = _legend(sweep_lines(metrics, outcomes[0]))
    figure.legend(handles=handles, loc="outside lower left", ncols=1 if is_narrow(width) else 4, handlelength=2.4)
    return figure


def _draw_outcome(
    ax: Any, metrics: Mapping[str, Any], outcome: str, lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]
) -> None:
    ax.axhline(0, color=LIGHT["rule"], linewidth=0.8)
    for number_of_arm, (arm, line) in enumerate(lines.items()):
        colour = LIGHT[ARMS[number_of_arm % len(ARMS)]]
        strengths = [strength for strength, _ in line]
        for strength, values in line:
            for draw, value in enumerate(values.get("controls") or (), 1):
                (dot,) = ax.plot(strength, value, "o", color=LIGHT["muted"], markersize=4, markerfacecolor="none", markeredgewidth=0.8)
                hover(dot, f"control draw {draw} at strength {strength:g}: {number(value)}")
        bounds = [values["ci"] if is_interval(values.get("ci")) else (math.nan, math.nan) for _, values in line]
        ax.fill_between(strengths, *zip(*bounds, strict=True), color=colour, alpha=0.16, linewidth=0)
        dashes = DASHES[number_of_arm % len(DASHES)] or (None, None)
        ax.plot(strengths, [values["mean"] for _, values in line], color=colour, linewidth=1.9, dashes=dashes)
        for strength, values in line:
            (dot,) = ax.plot(strength, values["mean"], "o", color=colour, markersize=5)
            hover(dot, f"{arm} at strength {strength:g}: {estimate(values['mean'], values.get('ci'))}")
    better = better_label(metrics, outcome)
    ax.set_title(axis_label(metrics, outcome) + (f" ({better})" if better else ""))
    ax.tick_params(length=3)


def _legend(lines: Lines) -> list[Any]:
    line, patch = extra("matplotlib.lines").Line2D, extra("matplotlib.patches").Patch
    handles = [
        line([], [], color=LIGHT[ARMS[i % len(ARMS)]], marker="o", markersize=5, dashes=DASHES[i % len(DASHES)] or (None, None), label=arm)
        for i, arm in enumerate(lines)
    ]
    if any(is_interval(values.get("ci")) for points in lines.values() for _, values in points):
        handles.append(patch(color=LIGHT["other"], alpha=0.5, label="95 % interval"))
    if any(values.get("controls") for points in lines.values() for _, values in points):
        style = {"marker": "o", "markersize": 4, "markerfacecolor": "none", "linewidth": 0}
        handles.append(line([], [], color=LIGHT["muted"], label="one control draw", **style))
    return handles
