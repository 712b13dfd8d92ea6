"""Drift curves as pictures: a panel per arm, with the band of the random directions behind its line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.drift.records import DriftRecord
from steer.errors import ConfigError
from steer.report.canvas import WIDE, annotate, is_narrow, lines, new_figure, styled, whole_number_ticks
from steer.report.curves import BAND, UNITS, ArmCurve, DriftCurve, drift_curves
from steer.report.extra import extra
from steer.report.numbers import number, percentage
from steer.report.palette import ARMS, LIGHT

COLUMNS = 4


def drift_figure(
    drift: Mapping[str, Sequence[DriftRecord]],
    path: str | Path,
    *,
    direction: str | None = None,
    site: str | None = None,
    mode: str = "probe",
    unit: str = "sd",
    labels: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Draws the drift of one direction at one site, a panel per arm, into a picture of its own.

    Args:
        drift: records by arm.
        path: ends in `.png` or `.svg`.
        direction, site: the first there is when not given.
        mode: `probe` or `stream`.
        unit: `sd` (baseline standard deviations) or `gap` (class gaps of the direction).
        labels: names of the arms for the reader; their order chooses the colours.
        notes: a short remark under the name of an arm, e.g. that it is steered at this site.

    Raises:
        ConfigError: another suffix, no such curve, or matplotlib is missing.

    Example:
        >>> with tracker.attached(model):
        ...     records = tracker.measure(0)
        ...     train(model, optimizer)
        ...     records = [*records, *tracker.measure(1)]
        >>> steer.report.drift_figure({"fine-tune": records}, "drift.svg")
        PosixPath('drift.svg')
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise _unknown_suffix(path)
    curves = drift_curves(drift, unit=unit)
    wanted = {"direction": direction, "site": site, "mode": mode}
    chosen = [curve for curve in curves if all(value in (None, getattr(curve, name)) for name, value in wanted.items())]
    if not chosen:
        raise _no_such_curve(wanted, curves)
    with styled():
        figure = draw_drift(chosen[0], labels or {}, notes or {}, WIDE)
        figure.suptitle(f"Drift of the {chosen[0].thing} \u201c{chosen[0].direction}\u201d at {chosen[0].site}", x=0.01, ha="left", size=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def draw_drift(curve: DriftCurve, labels: Mapping[str, str], notes: Mapping[str, str], width: float) -> Any:
    """A panel per arm on common axes: its own line, its control band, each of its runs, and the other arms in the background."""
    narrow = is_narrow(width)
    rows = math.ceil(len(curve.arms) / (1 if narrow else COLUMNS))
    columns = math.ceil(len(curve.arms) / rows)
    width = min(width, {1: 5.6, 2: 8.4}.get(columns, width))
    figure = new_figure(width, (1.9 if narrow else 2.5) * rows + 0.75)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    order = [*labels, *(arm.arm for arm in curve.arms if arm.arm not in labels)]
    noted = any(notes.get(arm.arm) for arm in curve.arms)
    for ax, arm in zip(axes.flat, curve.arms, strict=False):
        colour = LIGHT[ARMS[order.index(arm.arm) % len(ARMS)]]
        _draw_panel(ax, curve, arm, colour)
        title = lines(labels.get(arm.arm, arm.arm), round(9 * width / columns))
        ax.set_title(title, color=colour, weight="bold", pad=18 if noted else None)
        annotate(ax, notes.get(arm.arm, ""), (0, 1), (0, 7), xycoords="axes fraction", color=LIGHT["muted"], size=8)
    _label_axes(axes, curve, columns)
    figure.legend(handles=_legend(curve), loc="outside lower left", ncols=1 if narrow else 4, handlelength=1.8, columnspacing=2.2)
    return figure


def _draw_panel(ax: Any, curve: DriftCurve, arm: ArmCurve, colour: str) -> None:
    ax.fill_between(arm.steps, -arm.band, arm.band, color=LIGHT["band"], linewidth=0)
    ax.axhline(0, color=LIGHT["rule"], linewidth=0.8)
    for background in curve.arms:
        if background is not arm:
            ax.plot(background.steps, background.effect, color=LIGHT["other"], linewidth=0.9)
    if len(arm.runs) > 1:
        for run in arm.runs:
            ax.plot(arm.steps, run.effect, color=colour, linewidth=0.7, alpha=0.4)
    ax.plot(arm.steps, arm.effect, color=colour, linewidth=2.0, marker="o" if len(arm.steps) == 1 else "", markersize=4)
    if math.isfinite(arm.effect[-1]):
        ax.plot(arm.steps[-1:], arm.effect[-1:], color=colour, marker="o", markersize=4.5)
        value = number(float(arm.effect[-1]), signed=True, digits=1 if curve.unit == "sd" else 2)
        annotate(ax, value, (arm.steps[-1], arm.effect[-1]), (6, 0), va="center", color=colour, weight="bold")
    ax.tick_params(length=3)


def _label_axes(axes: Any, curve: DriftCurve, columns: int) -> None:
    """Labels on the left and at the bottom alone; panels without an arm are taken away."""
    for ax in axes.flat[len(curve.arms) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel(f"shift, {UNITS[curve.unit]}")
    first = min(int(arm.steps[0]) for arm in curve.arms)
    last = max(int(arm.steps[-1]) for arm in curve.arms)
    length = max(last - first, 1)
    axes[0, 0].set_xlim(first - 0.02 * length, last + 0.22 * length)  # room for the number at the end of the line
    axes[0, 0].xaxis.set_major_locator(extra("matplotlib.ticker").FixedLocator(_ticks(first, last)))
    for ax in axes.flat[max(0, len(curve.arms) - columns) : len(curve.arms)]:
        ax.set_xlabel("optimiser step")
        ax.tick_params(labelbottom=True)


def _ticks(first: int, last: int) -> list[int]:
    """Whole steps, the last one never crowded by its neighbour."""
    return [int(tick) for tick in whole_number_ticks(4).tick_values(first, last) if first <= tick <= last]


def _legend(curve: DriftCurve) -> list[Any]:
    line = extra("matplotlib.lines").Line2D
    several = max(len(arm.runs) for arm in curve.arms) > 1
    words = f"{curve.direction}, this arm{', mean of its runs' if several else ''}"
    handles = [line([], [], color=LIGHT["ink"], linewidth=2, label=words)]
    if several:
        handles.append(line([], [], color=LIGHT["ink"], linewidth=0.7, alpha=0.5, label="one run (seed or draw)"))
    if len(curve.arms) > 1:
        handles.append(line([], [], color=LIGHT["other"], linewidth=0.9, label=f"{curve.direction}, other arms"))
    if count := max(arm.controls for arm in curve.arms):
        band = f"{percentage(BAND)} of {count} random directions"
        handles.append(extra("matplotlib.patches").Patch(color=LIGHT["band"], label=band))
    return handles


# ---- errors


def _unknown_suffix(path: Path) -> ConfigError:
    expected = "a path that ends in .png or .svg"
    remedy = f"call it '{path.stem}.png'"
    return ConfigError(f"cannot draw into '{path.name}'", expected=expected, found=path.suffix or "no ending", remedy=remedy)


def _no_such_curve(wanted: Mapping[str, str | None], curves: Sequence[DriftCurve]) -> ConfigError:
    return ConfigError(
        "no drift records of " + ", ".join(f"{name} '{value}'" for name, value in wanted.items() if value is not None),
        expected="a direction, site and mode that were tracked together",
        found=[f"{curve.direction} at {curve.site} ({curve.mode})" for curve in curves] or "no records of a named direction",
        remedy="choose one of these curves" if curves else "track at least one named direction in the run",
    )
