"""The drawings of the report: drift curves, separation by site, training loss. The page and a README share them."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from steer.drift.records import DriftRecord
from steer.errors import ConfigError
from steer.report.curves import BAND, UNITS, ArmCurve, DriftCurve, drift_curves, natural
from steer.report.extra import extra
from steer.report.numbers import number, percentage
from steer.report.palette import ARMS, DASHES, LIGHT

COLUMNS = 4
WIDTH = 11.4  # inches; the page shows an inch as 98 pixels, so this fills its column
ROUND = [1, 2, 5, 10]  # steps between ticks
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "figure.facecolor": LIGHT["paper"],
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["muted"],
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "text.color": LIGHT["ink"],
    "svg.fonttype": "none",
    "svg.hashsalt": "steer",
}


@contextmanager
def _style() -> Iterator[None]:
    with extra("matplotlib").rc_context(STYLE):
        yield


def _figure(width: float, height: float) -> Any:
    return extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


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
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        expected, found = "a path that ends in .png or .svg", path.suffix or "no ending"
        raise ConfigError(f"cannot draw into '{path.name}'", expected=expected, found=found, remedy=f"call it '{path.stem}.png'")
    curves = drift_curves(drift, unit=unit)
    wanted = {"direction": direction, "site": site, "mode": mode}
    chosen = [curve for curve in curves if all(value in (None, getattr(curve, name)) for name, value in wanted.items())]
    if not chosen:
        raise ConfigError(
            "no drift records of " + ", ".join(f"{name} '{value}'" for name, value in wanted.items() if value is not None),
            expected="a direction, site and mode that were tracked together",
            found=[f"{curve.direction} at {curve.site} ({curve.mode})" for curve in curves] or "no records of a named direction",
            remedy="choose one of these curves" if curves else "track at least one named direction in the run",
        )
    with _style():
        figure = draw_drift(chosen[0], labels or {}, notes or {})
        figure.suptitle(f"Drift of the direction \u201c{chosen[0].direction}\u201d at {chosen[0].site}", x=0.01, ha="left", size=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def draw_drift(curve: DriftCurve, labels: Mapping[str, str], notes: Mapping[str, str]) -> Any:
    """A panel per arm on common axes: its own line, its control band, and the other arms in the background."""
    rows = math.ceil(len(curve.arms) / COLUMNS)
    columns = math.ceil(len(curve.arms) / rows)
    width = {1: 5.6, 2: 8.4}.get(columns, WIDTH)
    figure = _figure(width, 2.5 * rows + 0.75)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    order = [*labels, *(arm.arm for arm in curve.arms if arm.arm not in labels)]
    noted = any(notes.get(arm.arm) for arm in curve.arms)
    for ax, arm in zip(axes.flat, curve.arms, strict=False):
        colour = LIGHT[ARMS[order.index(arm.arm) % len(ARMS)]]
        _drift_panel(ax, curve, arm, colour)
        title = _wrapped(labels.get(arm.arm, arm.arm), round(9 * width / columns))
        ax.set_title(title, color=colour, weight="bold", pad=18 if noted else None)
        _beside(ax, notes.get(arm.arm, ""), (0, 1), (0, 7), xycoords="axes fraction", color=LIGHT["muted"], size=8)
    for ax in axes.flat[len(curve.arms) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel(f"shift, {UNITS[curve.unit]}")
    last = max(int(arm.steps[-1]) for arm in curve.arms)
    first = min(int(arm.steps[0]) for arm in curve.arms)
    axes[0, 0].set_xlim(first - 0.02 * max(last - first, 1), last + 0.22 * max(last - first, 1))
    axes[0, 0].xaxis.set_major_locator(extra("matplotlib.ticker").FixedLocator(_ticks(first, last)))
    for ax in axes.flat[max(0, len(curve.arms) - columns) : len(curve.arms)]:
        ax.set_xlabel("optimiser step")
        ax.tick_params(labelbottom=True)
    figure.legend(handles=_drift_legend(curve), loc="outside lower left", ncols=3, handlelength=1.8, columnspacing=2.2)
    return figure


def _drift_panel(ax: Any, curve: DriftCurve, arm: ArmCurve, colour: str) -> None:
    ax.fill_between(arm.steps, -arm.band, arm.band, color=LIGHT["band"], linewidth=0)
    ax.axhline(0, color=LIGHT["rule"], linewidth=0.8)
    for other in curve.arms:
        if other is not arm:
            ax.plot(other.steps, other.effect, color=LIGHT["other"], linewidth=0.9)
    ax.plot(arm.steps, arm.effect, color=colour, linewidth=2.0, marker="o" if len(arm.steps) == 1 else "", markersize=4)
    if math.isfinite(arm.effect[-1]):
        ax.plot(arm.steps[-1:], arm.effect[-1:], color=colour, marker="o", markersize=4.5)
        value = number(float(arm.effect[-1]), signed=True, digits=1 if curve.unit == "sd" else 2)
        _beside(ax, value, (arm.steps[-1], arm.effect[-1]), (6, 0), va="center", color=colour, weight="bold")
    ax.tick_params(length=3)


def _wrapped(label: str, width: int) -> str:
    """At most two lines that fit over a panel."""
    return "\n".join(textwrap.wrap(label, width, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}"))


def _beside(ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text some points away from a place in the axes."""
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def _ticks(first: int, last: int) -> list[int]:
    """Whole steps, the last one never crowded by its neighbour."""
    found = extra("matplotlib.ticker").MaxNLocator(4, integer=True, steps=ROUND).tick_values(first, last)
    return [int(tick) for tick in found if first <= tick <= last]


def _drift_legend(curve: DriftCurve) -> list[Any]:
    lines, patches = extra("matplotlib.lines"), extra("matplotlib.patches")
    handles = [lines.Line2D([], [], color=LIGHT["ink"], linewidth=2, label=f"{curve.direction}, this arm")]
    if len(curve.arms) > 1:
        handles.append(lines.Line2D([], [], color=LIGHT["other"], linewidth=0.9, label=f"{curve.direction}, other arms"))
    if count := max(arm.controls for arm in curve.arms):
        handles.append(patches.Patch(color=LIGHT["band"], label=f"{percentage(BAND)} of {count} random directions"))
    return handles


def draw_separation(auc: Mapping[str, float], chosen: str | None) -> Any:
    """Held-out AUC by site: a line over the layers when all sites are one part of a block, else a dot per site."""
    sites = sorted(auc, key=natural)
    values = [auc[site] for site in sites]
    found = [re.fullmatch(r"layers\.(\d+)\.(.+)", site) for site in sites]
    parts = {match[2] for match in found if match}
    colour, floor = LIGHT["arm-0"], min([0.45, *(value for value in values if math.isfinite(value))]) - 0.03
    if all(found) and len(parts) == 1:
        layers = [int(match[1]) for match in found if match]
        figure = _figure(6.6, 2.5)
        ax = figure.subplots()
        ax.axhline(0.5, color=LIGHT["rule"], linewidth=0.8)
        ax.plot(layers, values, color=colour, linewidth=1.6, marker="o", markersize=3.2)
        ax.set(ylim=(floor, 1.04), xlabel=f"layer (site layers.N.{parts.pop()})", ylabel="held-out AUC")
        ax.xaxis.set_major_locator(extra("matplotlib.ticker").MaxNLocator(integer=True, steps=ROUND))
        _beside(ax, "chance", (layers[0], 0.5), (0, 3), color=LIGHT["muted"], size=8)
        if chosen in sites:
            at = sites.index(chosen)
            ax.plot(layers[at], values[at], color=colour, marker="o", markersize=10, markerfacecolor="none", markeredgewidth=1.4)
            _beside(ax, "used", (layers[at], values[at]), (0, -17), ha="center", color=colour, weight="bold")
        return figure
    figure = _figure(6.6, 0.24 * len(sites) + 0.8)
    ax = figure.subplots()
    ax.axvline(0.5, color=LIGHT["rule"], linewidth=0.8)
    ax.hlines(range(len(sites)), 0.5, values, color=LIGHT["other"], linewidth=1.2)
    ax.plot(values, range(len(sites)), color=colour, linestyle="", marker="o", markersize=4.5)
    ax.set(xlim=(floor, 1.04), xlabel="held-out AUC (0.5 = chance)")
    ax.set_yticks(range(len(sites)), [f"{site} (used)" if site == chosen else site for site in sites])
    ax.invert_yaxis()
    return figure


def draw_losses(losses: Sequence[tuple[str, int, Sequence[float]]]) -> Any:
    """Training loss by optimiser step: every batch in a faint line, a running mean over it.

    Args:
        losses: label, number of the arm (its colour and dashes), loss of every step.
    """
    figure = _figure(9.2, 3.1)
    ax = figure.subplots()
    for label, index, loss in losses:
        colour, dashes = LIGHT[ARMS[index % len(ARMS)]], DASHES[index % len(DASHES)]
        steps = np.arange(1, len(loss) + 1)
        width = running_width(len(loss))
        if width > 1:
            ax.plot(steps, loss, color=colour, linewidth=0.7, alpha=0.25)
        ax.plot(steps, running_mean(loss, width), color=colour, linewidth=1.8, dashes=dashes or (None, None), label=_short(label))
    ax.set(xlabel="optimiser step", ylabel="loss, nat per token")
    ax.xaxis.set_major_locator(extra("matplotlib.ticker").MaxNLocator(integer=True, steps=ROUND))
    ax.tick_params(length=3)
    figure.legend(loc="outside lower left", handlelength=3.2)
    return figure


def _short(label: str) -> str:
    return textwrap.shorten(label, 110, placeholder=" \N{HORIZONTAL ELLIPSIS}")


def running_width(steps: int) -> int:
    """Window of the running mean: a tenth of the run, odd."""
    return max(1, steps // 10) | 1


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """[len(values)] centred mean over `width` steps, over fewer at both ends."""
    x, reach = np.asarray(values, dtype=float), width // 2
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])


def inline_svg(draw: Any, *args: Any, key: str, title: str, description: str) -> str:
    """Draws and returns SVG to be put into HTML: coloured by the page's custom properties, labelled, with ids that begin with `key`.

    Args:
        draw: one of the `draw_` functions; args: its arguments.
        key: unique in the page.
        title, description: what a screen reader says.
    """
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with fonts of its own
        buffer = io.StringIO()
        draw(*args).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r'(<[^<>]*?\sid=")', rf"\g<1>{key}-", body)
    body = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{key}-", body).replace("xlink:href=", "href=")
    for role, colour in LIGHT.items():
        body = re.sub(rf"{colour}\b", f"var(--{role})", body, flags=re.IGNORECASE)
    width = 1.36 * float(box[1].split()[2])
    return (
        f'<svg class="plot" viewBox="{box[1]}" style="max-width:{width:.0f}px" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>{body}'
    )
