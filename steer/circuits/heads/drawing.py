"""Drawings of attention patterns: panels of a figure, and tables of HTML."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.files import atomic_write
from steer.lens.plot import matplotlib_module, shown

CELL, LEAST, LABELLED = 0.16, 2.2, 48  # inches of a cell and of a panel at least; tokens that still have room for their words
SHADE = (31, 90, 166)  # red, green and blue of the weight 1


def draw_patterns(panels: Sequence[tuple[str, Tensor]], tokens: Sequence[str], caption: str, path: str | Path | None) -> Any:
    """A figure with one panel a head. panels: titles and patterns [tokens, tokens]. Written atomically when there is a path."""
    figure_module = matplotlib_module("matplotlib.figure")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    side = max(LEAST, CELL * len(tokens)) + 1.1  # room for words
    words = [shown(token) for token in tokens]
    with matplotlib_module("matplotlib").rc_context(
        {"font.size": 7, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "steer"}
    ):
        figure = figure_module.Figure(figsize=(columns * side, lines * side + 0.4), layout="compressed")
        for ax, (title, pattern) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False):
            image = ax.imshow(pattern.numpy(), cmap="Blues", vmin=0, vmax=1)
            if len(words) <= LABELLED:
                ax.set_xticks(range(len(words)), words, rotation=90)
                ax.set_yticks(range(len(words)), words)
            ax.set_title(_in_lines(title, side), loc="left")
        for ax in list(figure.axes)[len(panels) :]:
            ax.set_axis_off()
        figure.colorbar(image, ax=figure.axes, shrink=0.6, pad=0.01)
        figure.suptitle(caption, x=0.01, ha="left")
        if path is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "svg")
            atomic_write(path, buffer.getvalue())
    return figure


def _in_lines(title: str, inches: float) -> str:
    head, _, changes = title.partition(": ")
    lines, width = [head], int(inches * 12)
    for change in changes.split(", "):
        if len(lines) > 1 and len(lines[-1]) + len(change) + 2 <= width:
            lines[-1] += f", {change}"
        else:
            lines.append(change)
    return "\n".join(lines)


def pattern_table(title: str, pattern: Tensor, tokens: Sequence[str]) -> str:
    """A table of HTML, rows look at columns; what a cell stands for is said under the pointer."""
    words = [html.escape(shown(token)) for token in tokens]
    header = "".join(f"<th scope='col' style='font-weight:normal;writing-mode:vertical-rl'>{word}</th>" for word in words)
    rows = []
    for i, weights in enumerate(pattern.tolist()):
        cells = "".join(
            f"<td style='background:rgba{(*SHADE, round(weight, 3))}' title='{words[i]} &rarr; {words[j]}: {weight:.3f}'></td>"
            for j, weight in enumerate(weights)
        )
        rows.append(f"<tr><th scope='row' style='font-weight:normal;text-align:right'>{words[i]}</th>{cells}</tr>")
    style = "border-collapse:collapse;font-size:11px;display:inline-table;margin:0 1em 1em 0"
    caption = f"<caption style='text-align:left'>{html.escape(title)}</caption>"
    return f"<table style='{style}'>{caption}<tr><td></td>{header}</tr>{''.join(rows)}</table>"
