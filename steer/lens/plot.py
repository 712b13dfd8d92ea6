"""Drawing of a reading: a table of tokens, shaded by a number."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.errors import ConfigError
from steer.files import atomic_write

CELL, LABELS = 0.62, 1.4  # inches: least width of a cell, room for the names of the sites


def draw(
    sites: Sequence[str],
    tokens: Sequence[str],
    words: Sequence[Sequence[str]],
    shades: Any,
    title: str,
    path: str | Path | None,
    width: float,
    *,
    dark_is_high: bool,
) -> Any:
    """A figure of sites (the last on top) by tokens. words, shades: [sites][tokens]. Written atomically when there is a path."""
    figure_module = matplotlib_module("matplotlib.figure")
    size = (max(width, LABELS + CELL * len(tokens)), 0.24 * len(sites) + 1.2)
    with matplotlib_module("matplotlib").rc_context(
        {"font.size": 7.5, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "steer"}
    ):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(shades, aspect="auto", origin="lower", cmap="Blues" if dark_is_high else "Blues_r")
        for i, of_site in enumerate(words):
            for j, word in enumerate(of_site):
                is_dark = (image.norm(shades[i][j]) > 0.6) is dark_is_high if image.norm(shades[i][j]) != 0.6 else False
                ax.text(j, i, shown(word), ha="center", va="center", color="white" if is_dark else "black", clip_on=True)
        ax.set_xticks(range(len(tokens)), [shown(token) for token in tokens], rotation=45, ha="right")
        ax.set_yticks(range(len(sites)), sites)
        ax.set_title(title, loc="left")
        figure.colorbar(image, ax=ax, pad=0.01)
        if path is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "svg")
            atomic_write(path, buffer.getvalue())
    return figure


def shown(token: str) -> str:
    """A token as a short word: its spaces and line ends are made visible where there is nothing else."""
    plain = token.strip() or token.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(
        "\t", "\N{RIGHTWARDS ARROW}"
    )
    return plain if len(plain) <= 9 else f"{plain[:8]}\N{HORIZONTAL ELLIPSIS}"


def matplotlib_module(module: str) -> Any:
    """Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _nomatplotlib_module(error) from error


def _nomatplotlib_module(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        "the plot of a reading needs 'matplotlib'",
        expected="matplotlib, which the extra `report` installs",
        found=f"no module '{error.name}'",
        remedy="pip install 'torchsteer[report]'",
    )
