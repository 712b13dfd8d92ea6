"""The chart of the primary outcome: a row for each arm on one axis, with intervals, seeds as dots and control draws as a cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steer.errors import ConfigError
from steer.report.canvas import hover, is_narrow, lines, new_figure, short, styled
from steer.report.extra import extra
from steer.report.numbers import measured, number
from steer.report.palette import ARMS, LIGHT
from steer.report.rows import ArmRow, arm_rows, axis_label, better_label, is_change, primary_outcome
from steer.report.schema import read

ARROWS = {"lower is better": "\N{LEFTWARDS ARROW} lower is better", "higher is better": "higher is better \N{RIGHTWARDS ARROW}"}
SEEDS_AT, DRAWS_AT = 0.23, 0.25  # below and above the interval of a row, whose height is 1


def comparison_figure(metrics: Mapping[str, Any], *, width: float = 8.0) -> Any:
    """A matplotlib figure of the primary outcome in every arm, for a notebook: intervals, seeds and control draws on one axis.

    Args:
        metrics: the content of metrics.json.
        width: in inches.

    Raises:
        ConfigError: matplotlib is missing, or no arm was measured. WrongKindError: metrics of another schema.

    Example:
        >>> comparison_figure(result.metrics).savefig("comparison.png")
    """
    tree = read(metrics)
    if not has_rows(tree):
        raise _nothing_measured()
    with styled():
        return draw_primary(tree, width)


def has_rows(metrics: Mapping[str, Any]) -> bool:
    """There is something to draw."""
    outcome = primary_outcome(metrics)
    return outcome is not None and any(row.numbers for row in arm_rows(metrics, outcome))


def draw_primary(metrics: Mapping[str, Any], width: float) -> Any:
    """Rows from the top in the order of the arms; a band behind all of them where the control draws lie."""
    outcome = primary_outcome(metrics)
    assert outcome is not None, "see has_rows"
    rows = arm_rows(metrics, outcome)
    narrow, change = is_narrow(width), is_change(metrics, outcome)
    figure = new_figure(width, (0.95 if narrow else 0.7) * len(rows) + (1.9 if narrow else 1.35))
    ax = figure.subplots()
    drawn = compared_draws(metrics, rows)
    if len(drawn) > 1:
        ax.axvspan(min(drawn), max(drawn), color=LIGHT["band"], linewidth=0, zorder=0)
    if change:
        ax.axvline(0, color=LIGHT["other"], linewidth=0.9, zorder=1)
    for y, row in enumerate(rows):
        _draw_row(ax, row, y, change)
        _write_row(ax, row, y, change, narrow)
    ax.set_ylim(len(rows) - 0.45, -0.75 if narrow else -0.55)
    ax.margins(x=0.06)
    what = "change from the base model" if change else ""
    better = ARROWS.get(better_label(metrics, outcome), "")
    label = axis_label(metrics, outcome, what)
    ax.set_xlabel("\n".join(filter(None, (lines(label, 44) if narrow else label, better))))
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", length=3)
    ax.grid(axis="x", color=LIGHT["rule"], linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    figure.legend(
        handles=_legend(rows, len(drawn)), loc="outside lower left", ncols=1 if narrow else 4, handlelength=1.4, columnspacing=1.6
    )
    return figure


def compared_draws(metrics: Mapping[str, Any], rows: Sequence[ArmRow]) -> list[float]:
    """Draws of the control of the primary contrast; of every control where the tree does not say which that is."""
    arm = ((metrics.get("question") or {}).get("primary") or {}).get("arm")
    controls = [str(each["name"]) for each in metrics.get("arms") or [] if each.get("control_of") == arm and arm is not None]
    return [draw for row in rows for draw in row.draws if not controls or row.name in controls]


def _draw_row(ax: Any, row: ArmRow, y: int, signed: bool) -> None:
    colour = LIGHT[ARMS[row.index % len(ARMS)]]
    # The same scatter on every run, so that one tree gives one file.
    scatter = np.random.default_rng(0).uniform(-0.07, 0.07, len(row.draws))
    for number_of_draw, (draw, jitter) in enumerate(zip(row.draws, scatter, strict=True), 1):
        (dot,) = ax.plot(draw, y + DRAWS_AT + jitter, "o", color=colour, markersize=4.6, markerfacecolor="none", markeredgewidth=0.9)
        hover(dot, f"{row.name}, control draw {number_of_draw}: {number(draw, signed=signed)}")
    for seed, value in row.seeds.items():
        (dot,) = ax.plot(value, y - SEEDS_AT, "o", color=colour, markersize=3.4, markeredgewidth=0, alpha=0.8)
        hover(dot, f"{row.name}, seed {seed}: {number(value, signed=signed)}")
    if row.low is not None and row.high is not None:
        (line,) = ax.plot([row.low, row.high], [y, y], color=colour, linewidth=2.4)
        hover(line, f"{row.name}: {row.words(signed=signed)}, 95 % interval{' ' * bool(row.holds_for)}{row.holds_for}")
    if row.value is not None:
        (dot,) = ax.plot(row.value, y, "D", color=colour, markersize=6.4, markeredgewidth=0, zorder=4)
        hover(dot, f"{row.name}: {row.words(signed=signed)}")


def _write_row(ax: Any, row: ArmRow, y: int, signed: bool, narrow: bool) -> None:
    """Name, label and numbers: beside the row, or above it on a telephone."""
    style = {"transform": ax.get_yaxis_transform(), "va": "center"}
    words = row.words(signed=signed)
    ax.set_yticks([])
    if narrow:
        ax.text(0, y - 0.47, short(row.name, 22), weight="bold", size=8.5, **style)
        ax.text(1, y - 0.47, words, ha="right", size=8.5, color=LIGHT["muted"], **style)
        return
    has_label = row.label != row.name
    ax.text(-0.015, y - 0.2 * has_label, row.name, ha="right", weight="bold", **style)
    if has_label:
        ax.text(-0.015, y - 0.02, lines(row.label, 40), ha="right", size=8, color=LIGHT["muted"], **(style | {"va": "top"}))
    ax.text(1.01, y, words, ha="left", color=LIGHT["muted"], **style)


def _legend(rows: Sequence[ArmRow], draws: int) -> list[Any]:
    line, patch = extra("matplotlib.lines").Line2D, extra("matplotlib.patches").Patch
    has_interval = any(measured(row.low) for row in rows)
    ink = LIGHT["muted"]
    handles = [line([], [], color=ink, marker="D", markersize=5.5, linewidth=2 if has_interval else 0, label=_mean(has_interval))]
    if any(row.seeds for row in rows):
        handles.append(line([], [], color=ink, marker="o", markersize=3.4, linewidth=0, label="one seed"))
    if draws:
        style = {"marker": "o", "markersize": 4.6, "markerfacecolor": "none", "markeredgewidth": 0.9, "linewidth": 0}
        handles.append(line([], [], color=ink, label="one control draw", **style))
    if draws > 1:
        handles.append(patch(color=LIGHT["band"], label=f"range of the {draws} control draws"))
    return handles


def _mean(has_interval: bool) -> str:
    return "mean, 95 % interval" if has_interval else "mean"


def _nothing_measured() -> ConfigError:
    remedy = "measure an outcome in at least one arm"
    return ConfigError("there is nothing to draw", expected="a primary outcome with values", found="none", remedy=remedy)
