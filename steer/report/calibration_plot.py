"""Calibration: how far layers and doses move a model's answers, beside what they cost neutral text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.canvas import new_figure, styled
from steer.report.palette import LIGHT


def calibration_figure(found: Mapping[str, Any]) -> Any:
    """A matplotlib figure of `Calibration.to_dict()`: layers, each at its largest affordable dose, and the doses of the chosen layer.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with styled():
        figure = new_figure(9.8, 3.4)
        layers, doses = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 2]})
        ordered = _largest_doses(found["tried"])
        _draw(layers, ordered, range(len(ordered)), found)
        layers.set_xticks(range(len(ordered)), [f"{point['site']}\ndose {point['dose']:g}" for point in ordered], fontsize=7.5)
        layers.set_ylabel("own answers move by")
        layers.set_title("layers, each at the largest dose that neutral text allows")
        at_site = sorted((point for point in found["tried"] if point["site"] == found["site"]), key=lambda point: point["dose"])
        _draw(doses, at_site, [point["dose"] for point in at_site], found)
        doses.set_xlabel("relative dose")
        doses.set_title(f"doses at {found['site']}")
        for point in at_site:
            label = f"x{point['perplexity_ratio']:.2f}"
            doses.annotate(label, (point["dose"], point["reading"]["value"]), (5, -10), textcoords="offset points", fontsize=7.5)
    return figure


def _draw(ax: Any, points: Sequence[Mapping[str, Any]], places: Sequence[float], found: Mapping[str, Any]) -> None:
    """Points with their intervals: hollow where the point was rejected, in another colour where it was chosen."""
    ax.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    ax.axhline(1, color=LIGHT["rule"], linewidth=0.8)
    for place, point in zip(places, points, strict=True):
        chosen = (point["site"], point["dose"]) == (found["site"], found["dose"])
        colour = LIGHT["arm-1"] if chosen else LIGHT["arm-0"]
        reading = point["reading"]
        if reading["low"] is not None:
            ax.plot([place, place], [reading["low"], reading["high"]], color=colour, linewidth=1.6, alpha=0.5)
        ax.plot(place, reading["value"], "o", color=colour, markersize=6, markerfacecolor="none" if point["rejected"] else colour)


def _largest_doses(tried: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The point of the largest dose at each site, in the order in which the sites were tried."""
    largest: dict[str, Mapping[str, Any]] = {}
    for point in tried:
        if point["site"] not in largest or point["dose"] > largest[point["site"]]["dose"]:
            largest[point["site"]] = point
    return list(largest.values())
