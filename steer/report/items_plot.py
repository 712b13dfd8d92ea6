"""Which items moved: the difference of the primary contrast in every item, in order of size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.canvas import hover, lines, new_figure, short
from steer.report.numbers import measured, number
from steer.report.palette import ARMS, LIGHT

HOVERED = 400  # more dots than this are one drawing, without words under the pointer


def moved(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Items of the primary contrast with their differences, lowest first."""
    return sorted((item for item in metrics.get("items") or [] if measured(item.get("difference"))), key=lambda item: item["difference"])


def is_wrong_way(difference: float, better: str | None) -> bool:
    """The item got worse."""
    return difference > 0 if better == "lower" else difference < 0 if better == "higher" else False


def draw_items(items: Sequence[Mapping[str, Any]], better: str | None, label: str, width: float) -> Any:
    """A stem for each item, lowest first; those that moved the wrong way in a colour of their own."""
    figure = new_figure(min(width, 9.2), 2.5)
    ax = figure.subplots()
    right, wrong = LIGHT[ARMS[0]], LIGHT[ARMS[1]]
    differences = [float(item["difference"]) for item in items]
    colours = [wrong if is_wrong_way(difference, better) else right for difference in differences]
    ax.axhline(0, color=LIGHT["other"], linewidth=0.9)
    if len(items) > HOVERED:
        ax.vlines(range(len(items)), 0, differences, color=colours, linewidth=1)
    else:
        for place, (item, difference, colour) in enumerate(zip(items, differences, colours, strict=True)):
            stem = ax.vlines(place, 0, difference, color=colour, linewidth=max(1.0, min(5.0, 300 / len(items) * width / 11)))
            text = short(str(item.get("text") or ""), 90)
            hover(stem, ": ".join(filter(None, (str(item["id"]), text))) + f" ({number(difference, signed=True)})")
    ax.set(ylabel=lines(label, 26, most=3), xlabel=f"{len(items)} items, in order")
    ax.set_xticks([])
    ax.margins(x=0.01)
    ax.tick_params(length=3)
    ax.spines["bottom"].set_visible(False)
    return figure
