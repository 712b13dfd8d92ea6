"""Drawings of a run beside its drift: separation of the direction by site, training loss by step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steer.report.canvas import annotate, is_narrow, new_figure, short, whole_number_ticks
from steer.report.curves import natural
from steer.report.palette import ARMS, DASHES, LIGHT

AUC_COLOUR = LIGHT["arm-0"]


def draw_separation(auc: Mapping[str, float], chosen: str | None, width: float) -> Any:
    """Held-out AUC by site: a line over the layers when all sites are one part of a block, else a dot per site."""
    sites = sorted(auc, key=natural)
    lowest = min([0.45, *(auc[site] for site in sites if math.isfinite(auc[site]))]) - 0.03
    matches = [re.fullmatch(r"layers\.(\d+)\.(.+)", site) for site in sites]
    parts = {match[2] for match in matches if match}
    if all(matches) and len(parts) == 1:
        layers = {int(match[1]): auc[match[0]] for match in matches if match}
        layer = next((int(match[1]) for match in matches if match and match[0] == chosen), None)
        return _draw_layers(layers, parts.pop(), layer, lowest, min(width, 6.6))
    return _draw_sites({site: auc[site] for site in sites}, chosen, lowest, min(width, 6.6))


def _draw_layers(auc: Mapping[int, float], part: str, chosen: int | None, lowest: float, width: float) -> Any:
    figure = new_figure(width, 2.5)
    ax = figure.subplots()
    ax.axhline(0.5, color=LIGHT["rule"], linewidth=0.8)
    ax.plot(list(auc), list(auc.values()), color=AUC_COLOUR, linewidth=1.6, marker="o", markersize=3.2)
    ax.set(ylim=(lowest, 1.04), xlabel=f"layer (site layers.N.{part})", ylabel="held-out AUC")
    ax.xaxis.set_major_locator(whole_number_ticks())
    annotate(ax, "chance", (next(iter(auc)), 0.5), (0, 3), color=LIGHT["muted"], size=8)
    if chosen is not None:
        ax.plot(chosen, auc[chosen], color=AUC_COLOUR, marker="o", markersize=10, markerfacecolor="none", markeredgewidth=1.4)
        annotate(ax, "used", (chosen, auc[chosen]), (0, -17), ha="center", color=AUC_COLOUR, weight="bold")
    return figure


def _draw_sites(auc: Mapping[str, float], chosen: str | None, lowest: float, width: float) -> Any:
    figure = new_figure(width, 0.24 * len(auc) + 0.8)
    ax = figure.subplots()
    ax.axvline(0.5, color=LIGHT["rule"], linewidth=0.8)
    ax.hlines(range(len(auc)), 0.5, list(auc.values()), color=LIGHT["other"], linewidth=1.2)
    ax.plot(list(auc.values()), range(len(auc)), color=AUC_COLOUR, linestyle="", marker="o", markersize=4.5)
    ax.set(xlim=(lowest, 1.04), xlabel="held-out AUC (0.5 = chance)")
    ax.set_yticks(range(len(auc)), [f"{short(site, 40)} (used)" if site == chosen else short(site, 40) for site in auc])
    ax.invert_yaxis()
    return figure


def draw_losses(losses: Sequence[tuple[str, int, Sequence[float]]], width: float) -> Any:
    """Training loss by optimiser step: every batch in a faint line, a running mean over it.

    Args:
        losses: label, number of the arm (its colour and dashes), loss of every step.
    """
    figure = new_figure(min(width, 9.2), 3.1)
    ax = figure.subplots()
    for label, index, loss in losses:
        colour = LIGHT[ARMS[index % len(ARMS)]]
        dashes = DASHES[index % len(DASHES)] or (None, None)
        steps = np.arange(1, len(loss) + 1)
        window = running_width(len(loss))
        if window > 1:
            ax.plot(steps, loss, color=colour, linewidth=0.7, alpha=0.25)
        shown = short(label, 46 if is_narrow(width) else 110)
        ax.plot(steps, running_mean(loss, window), color=colour, linewidth=1.8, dashes=dashes, label=shown)
    ax.set(xlabel="optimiser step", ylabel="loss, nat per token")
    ax.xaxis.set_major_locator(whole_number_ticks())
    ax.tick_params(length=3)
    figure.legend(loc="outside lower left", handlelength=3.2)
    return figure


def running_width(steps: int) -> int:
    """Window of the running mean: a tenth of the run, odd."""
    return max(1, steps // 10) | 1


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """[len(values)] centred mean over `width` steps, over fewer at both ends."""
    x = np.asarray(values, dtype=float)
    reach = width // 2
    return np.array([x[max(0, i - reach) : i + reach + 1].mean() for i in range(len(x))])
