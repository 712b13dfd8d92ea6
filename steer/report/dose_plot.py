"""Dose and response: every outcome of a sweep over the dose, with the controls that were swept along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.canvas import hover, is_narrow, lines, new_figure
from steer.report.extra import extra
from steer.report.numbers import estimate, is_interval, measured, number
from steer.report.palette import ARMS, DASHES, LIGHT
from steer.report.rows import ArmRow, arm_rows, axis_label, better_label, is_change

COLUMNS = 2
UNTREATED = (1.5, 1.5)  # dashes of its line


def sweep_outcomes(metrics: Mapping[str, Any]) -> list[str]:
    """Outcomes that were measured along a sweep, in their order in the tree."""
    swept = {str(curve.get("outcome")) for curve in metrics.get("sweep") or [] if _points(curve)}
    return [name for name in metrics.get("outcomes") or {} if name in swept]


def sweep_curves(metrics: Mapping[str, Any], outcome: str) -> list[tuple[str, bool, list[Mapping[str, Any]]]]:
    """Name, whether it is a control, and points by ascending dose, of every curve of an outcome; controls last.

    The points are changes from the base model, with their far narrower intervals, where the arms of the doses have them.
    """
    rows = {row.name: row for row in arm_rows(metrics, outcome)} if is_change(metrics, outcome) else {}
    curves = [curve for curve in metrics.get("sweep") or [] if curve.get("outcome") == outcome and _points(curve)]
    ordered = sorted(curves, key=lambda curve: bool(curve.get("is_control")))
    return [
        (
            str(curve["name"]),
            bool(curve.get("is_control")),
            [_as_change(point, rows.get(str(point.get("arm")))) for point in _points(curve)],
        )
        for curve in ordered
    ]


def _as_change(point: Mapping[str, Any], row: ArmRow | None) -> Mapping[str, Any]:
    if row is None:
        return point
    return {**point, "mean": row.value, "ci": [row.low, row.high], "draws": row.draws}


def _points(curve: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    points = [point for point in curve.get("points") or [] if measured(point.get("dose")) and measured(point.get("mean"))]
    return sorted(points, key=lambda point: point["dose"])


def draw_sweep(metrics: Mapping[str, Any], width: float) -> Any:
    """A panel for each outcome over a common axis of doses."""
    outcomes = sweep_outcomes(metrics)
    columns = 1 if is_narrow(width) else min(COLUMNS, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    figure = new_figure(width if columns > 1 else min(width, 6.4), (2.9 if is_narrow(width) else 2.7) * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for ax, outcome in zip(axes.flat, outcomes, strict=False):
        _draw_outcome(ax, metrics, outcome, narrow=is_narrow(width))
    for ax in axes.flat[len(outcomes) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(0, len(outcomes) - columns) : len(outcomes)]:
        ax.set_xlabel("dose, times the strength of the arm")
        ax.tick_params(labelbottom=True)
    handles = _legend(metrics, outcomes[0])
    figure.legend(handles=handles, loc="outside lower left", ncols=1 if is_narrow(width) else 5, handlelength=2.4)
    return figure


def _draw_outcome(ax: Any, metrics: Mapping[str, Any], outcome: str, *, narrow: bool) -> None:
    untreated = _untreated(metrics, outcome)
    if untreated is not None:
        ax.axhline(untreated[1], color=LIGHT["muted"], linewidth=1.0, dashes=UNTREATED)
    change = is_change(metrics, outcome)
    for index, (name, is_control, points) in enumerate(sweep_curves(metrics, outcome)):
        colour = LIGHT["muted"] if is_control else LIGHT[ARMS[index % len(ARMS)]]
        doses = [point["dose"] for point in points]
        if is_control:
            _draw_draws(ax, name, points)
        else:
            bounds = [point["ci"] if is_interval(point.get("ci")) else (math.nan, math.nan) for point in points]
            ax.fill_between(doses, *zip(*bounds, strict=True), color=colour, alpha=0.16, linewidth=0)
        ax.plot(doses, [point["mean"] for point in points], color=colour, linewidth=1.9, dashes=_dashes(index, is_control))
        for point in points:
            (dot,) = ax.plot(point["dose"], point["mean"], "o", color=colour, markersize=5)
            hover(dot, f"{name} at dose {point['dose']:g}: {estimate(point['mean'], point.get('ci'), signed=change)}")
    label = axis_label(metrics, outcome, "change" if change else "")
    better = better_label(metrics, outcome)
    title = label + (f" ({better})" if better else "")
    ax.set_title(lines(title, 42) if narrow else title)
    ax.tick_params(length=3)


def _draw_draws(ax: Any, name: str, points: Sequence[Mapping[str, Any]]) -> None:
    for point in points:
        for draw, value in enumerate(point.get("draws") or (), 1):
            (dot,) = ax.plot(point["dose"], value, "o", color=LIGHT["muted"], markersize=4, markerfacecolor="none", markeredgewidth=0.8)
            hover(dot, f"{name}, draw {draw} at dose {point['dose']:g}: {number(value)}")


def _dashes(index: int, is_control: bool) -> Any:
    return (5, 2) if is_control else DASHES[index % len(DASHES)] or (None, None)


def _untreated(metrics: Mapping[str, Any], outcome: str) -> tuple[str, float] | None:
    """Name and value of the arm that nothing is done to."""
    untreated = {str(arm["name"]) for arm in metrics.get("arms") or [] if arm.get("when") == "never"}
    return next(((row.name, row.value) for row in arm_rows(metrics, outcome) if row.name in untreated and row.value is not None), None)


def _legend(metrics: Mapping[str, Any], outcome: str) -> list[Any]:
    line, patch = extra("matplotlib.lines").Line2D, extra("matplotlib.patches").Patch
    handles = []
    curves = sweep_curves(metrics, outcome)
    for index, (name, is_control, _) in enumerate(curves):
        colour = LIGHT["muted"] if is_control else LIGHT[ARMS[index % len(ARMS)]]
        words = f"{name}, mean of its draws" if is_control else name
        handles.append(line([], [], color=colour, marker="o", markersize=5, dashes=_dashes(index, is_control), label=words))
    if any(is_interval(point.get("ci")) for _, is_control, points in curves for point in points if not is_control):
        handles.append(patch(color=LIGHT["other"], alpha=0.5, label="95 % interval"))
    if any(is_control for _, is_control, _ in curves):
        style = {"marker": "o", "markersize": 4, "markerfacecolor": "none", "linewidth": 0}
        handles.append(line([], [], color=LIGHT["muted"], label="one control draw", **style))
    untreated = _untreated(metrics, outcome)
    if untreated is not None:
        handles.append(line([], [], color=LIGHT["muted"], linewidth=1.0, dashes=UNTREATED, label=untreated[0]))
    return handles
