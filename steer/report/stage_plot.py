"""Stage comparison as a picture: the features that moved most, with the interval of their change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.drift.stages import StageComparison
from steer.errors import ConfigError
from steer.report.canvas import WIDE, hover, lines, new_figure, styled
from steer.report.numbers import number
from steer.report.palette import ARMS, LIGHT


def stage_figure(comparison: StageComparison, path: str | Path, *, most: int = 20) -> Path:
    """Draws the features that moved most between two stages, in standard deviations of the change over texts.

    Args:
        path: ends in `.png` or `.svg`.
        most: features that are drawn.

    Raises:
        ConfigError: another suffix, or matplotlib is missing.

    Example:
        >>> comparison = steer.compare_features(dictionary, base, tuned, rows, draws=999)
        >>> steer.report.stage_figure(comparison, "stages.svg")
        PosixPath('stages.svg')
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise _unknown_suffix(path)
    with styled():
        figure = draw_stages(comparison, most, WIDE)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def draw_stages(comparison: StageComparison, most: int, width: float) -> Any:
    """A line for each feature, that which moved most at the top; those that did not move after correction are grey."""
    rows = comparison.table(most)
    figure = new_figure(width, 1.1 + 0.22 * len(rows))
    ax = figure.subplots()
    moved = set(comparison.moved)
    ax.axvline(0, color=LIGHT["other"], linewidth=0.9)
    for place, row in enumerate(rows):
        colour = LIGHT[ARMS[0]] if row["feature"] in moved else LIGHT["other"]
        sd = row["change"] / row["effect"] if row["effect"] else 1.0
        stem = ax.plot([row["low"] / sd, row["high"] / sd], [place, place], color=colour, linewidth=2.2)[0]
        ax.plot([row["effect"]], [place], "o", color=colour, markersize=4)
        hover(stem, f"feature {row['feature']}: {number(row['mean_a'])} to {number(row['mean_b'])}")
    ax.set_yticks(range(len(rows)), [f"{row['feature']:.0f}" for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel="change of the mean activation, in standard deviations over texts", ylabel="feature")
    words = (
        f"{len(moved)} of {comparison.tested} features moved; intervals hold together for all of them. Without a correction "
        f"{comparison.uncorrected} would seem to have, {comparison.by_chance:.0f} of them by chance."
    )
    ax.set_title(lines(words, 110))
    ax.tick_params(length=3)
    return figure


# ---- errors


def _unknown_suffix(path: Path) -> ConfigError:
    remedy = "end the name in .png or .svg"
    return ConfigError(
        f"'{path}' is no picture that can be drawn", expected=".png or .svg", found=path.suffix or "no ending", remedy=remedy
    )
