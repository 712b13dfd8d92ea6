"""Drawings of causal tracing: a heat map of one fact, tokens by layers, and average effects by layer with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.edits.tracing import AverageEffects, FactTrace, TraceResult
from steer.edits.tracing.result import MEASURES, PROBABILITY
from steer.lens.plot import shown
from steer.report.canvas import hover, is_narrow, new_figure, styled, whole_number_ticks
from steer.report.extra import extra
from steer.report.numbers import number
from steer.report.palette import ARMS, DASHES, LIGHT

RAISES, LOWERS = "arm-0", "arm-1"  # colours of what brings the answer back and of what takes it further away
FAINT = 0.02  # of the darkest cell; less is not drawn
KINDS = {"hidden": "one hidden state", "mlp": "outputs of MLPs", "attn": "outputs of attention"}


def trace_figure(result: TraceResult, number_of_fact: int | None = None, *, measure: str = PROBABILITY, width: float = 9.8) -> Any:
    """A matplotlib figure for a notebook: the heat map of one fact, or the averages over all facts.

    Args:
        number_of_fact: None for the averages.
        measure: `probability` or `logit difference`.
        width: in inches.
        result: what `steer.causal_trace` gave.

    Raises:
        ConfigError: matplotlib is missing, or an unknown measure.

    Example:
        >>> trace_figure(traced, 0).savefig("fact.png")
    """
    with styled():
        if number_of_fact is None:
            return draw_averages([result.average_effects(kind, measure) for kind in result.kinds], width)
        return draw_trace(result[number_of_fact], result.kinds, measure, width)


def draw_trace(trace: FactTrace, kinds: Sequence[str], measure: str, width: float) -> Any:
    """A panel for each kind: tokens from the top, layers from the left, one scale for all panels."""
    effects = trace.effects[MEASURES.index(measure)]  # [kinds, tokens, layers]
    most = float(effects.abs().max()) or 1.0
    narrow, n_tokens = is_narrow(width), len(trace.tokens)
    panel = 0.2 * n_tokens + 0.75
    figure = new_figure(width, panel * len(kinds) if narrow else panel + 0.2)
    axes = figure.subplots(len(kinds), 1, squeeze=False) if narrow else figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    subject = range(trace.first, trace.last + 1)
    for ax, kind, of_kind in zip(axes.flat, kinds, effects.tolist(), strict=True):
        for token, of_token in enumerate(of_kind):
            for layer, effect in enumerate(of_token):
                _draw_cell(ax, effect, most, token, layer, f"{trace.tokens[token].strip()!r}, layer {layer}: {number(effect, signed=True)}")
        ax.set_xlim(-0.5, len(of_kind[0]) - 0.5)
        ax.set_ylim(n_tokens - 0.5, -0.5)
        words = [f"{shown(token)}*" if place in subject else shown(token) for place, token in enumerate(trace.tokens)]
        ax.set_yticks(range(n_tokens), words)
        ax.xaxis.set_major_locator(whole_number_ticks(6))
        ax.set_xlabel("layer")
        ax.set_title(KINDS[kind])
        ax.tick_params(axis="y", length=0)
    return figure


def _draw_cell(ax: Any, effect: float, most: float, token: int, layer: int, said: str) -> None:
    share = min(1.0, abs(effect) / most)
    if share < FAINT:
        return
    colour = LIGHT[RAISES if effect > 0 else LOWERS]
    cell = extra("matplotlib.patches").Rectangle((layer - 0.5, token - 0.5), 1, 1, facecolor=colour, alpha=share, linewidth=0)
    hover(ax.add_patch(cell), said)


def draw_averages(averages: Sequence[AverageEffects], width: float) -> Any:
    """A panel for each kind, a line for each role of a token, with a band where the 95 % interval over facts lies."""
    narrow = is_narrow(width)
    figure = new_figure(width, 2.4 * len(averages) + 1.6 if narrow else 3.4)
    axes = figure.subplots(len(averages), 1, squeeze=False) if narrow else figure.subplots(1, len(averages), sharey=True, squeeze=False)
    for ax, average in zip(axes.flat, averages, strict=True):
        layers = range(average.mean.shape[1])
        ax.axhline(0, color=LIGHT["other"], linewidth=0.9)
        for place, (role, mean, half) in enumerate(zip(average.roles, average.mean, average.half, strict=True)):
            colour, dash = LIGHT[ARMS[place]], DASHES[place]
            line = ax.plot(layers, mean.tolist(), color=colour, linewidth=1.5, dashes=dash or (None, None), label=role)[0]
            hover(line, f"{role}, {average.n[place]} facts")
            if bool(half.isfinite().all()):
                ax.fill_between(layers, (mean - half).tolist(), (mean + half).tolist(), color=colour, alpha=0.12, linewidth=0)
        ax.xaxis.set_major_locator(whole_number_ticks(6))
        ax.set_xlabel("layer")
        ax.set_title(KINDS[average.kind])
        ax.tick_params(length=3)
    axes.flat[0].set_ylabel(f"indirect effect, {averages[0].measure}")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=1 if narrow else 6, handlelength=1.6, columnspacing=1.2)
    return figure
