"""What every drawing of the report shares: style, sizes, text beside a point, and SVG that can stand in the page."""

from __future__ import annotations

import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steer.report.extra import extra
from steer.report.palette import LIGHT

WIDE = 9.8  # inches; the page shows an inch as 98 pixels
NARROW = 3.3  # of a telephone
HOVER = "hover:"  # what an artist's gid begins with that says something under the pointer
ROUND_STEPS = [1, 2, 5, 10]  # of matplotlib's locator: distances between ticks
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
def styled() -> Iterator[None]:
    """Draws in the colours and fonts of the report."""
    with extra("matplotlib").rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside of pyplot's global state."""
    return extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def whole_number_ticks(count: int | None = None) -> Any:
    """Ticks at round whole numbers, at most so many and one more; None leaves the number to matplotlib."""
    return extra("matplotlib.ticker").MaxNLocator(count, integer=True, steps=ROUND_STEPS)


def is_narrow(width: float) -> bool:
    """The drawing is for a telephone: labels go above what they name, panels below one another."""
    return width < 5


def hover(artist: Any, text: str) -> None:
    """Says something while the pointer is over an artist, in the page; a picture of another kind has no such words."""
    artist.set_gid(f"{HOVER}{text}")


def short(text: str, length: int) -> str:
    """The beginning of a text that is too long for its place, as whole words where it has some."""
    words = textwrap.shorten(text, length, placeholder=" \N{HORIZONTAL ELLIPSIS}")
    return words if len(words) > length // 2 or len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def lines(text: str, width: int, *, most: int = 2) -> str:
    """A text on a few lines of at most so many characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" \N{HORIZONTAL ELLIPSIS}"))


def annotate(ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Writes text some points away from a place in the axes."""
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def both_widths(draw: Any, *args: Any, key: str, title: str, description: str) -> str:
    """Draws for a screen and for a telephone; the page shows the one that fits (see `inline_svg`).

    Args:
        draw: one of the `draw_` functions, which take the width in inches after their arguments.
    """
    words = {"title": title, "description": description}
    wide = inline_svg(draw, *args, WIDE, key=key, **words)
    narrow = inline_svg(draw, *args, NARROW, key=f"{key}-narrow", **words)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def inline_svg(draw: Any, *args: Any, key: str, title: str, description: str) -> str:
    """Draws and returns SVG to be put into HTML: coloured by the page's custom properties, labelled, with ids that begin with `key`.

    Args:
        draw: one of the `draw_` functions; args: its arguments.
        key: unique in the page.
        title, description: what a screen reader says.
    """
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with fonts of its own
        buffer = io.StringIO()
        draw(*args).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view_box = re.search(r'viewBox="([^"]+)"', head)
    assert view_box is not None, "matplotlib writes a viewBox"
    width = 1.36 * float(view_box[1].split()[2])  # points to the pixels of the page
    return (
        f'<svg class="plot" viewBox="{view_box[1]}" style="max-width:{width:.0f}px" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>'
        f"{_recoloured(_prefixed(_hovering(body), key))}"
    )


def _hovering(body: str) -> str:
    """Turns the ids of artists that say something into titles, which browsers show under the pointer."""
    # matplotlib writes single quotes around words that have double ones
    return re.sub(rf"""<g id=(["']){HOVER}(.*?)\1>""", r'<g class="hover"><title>\2</title>', body)


def _prefixed(body: str, key: str) -> str:
    """Gives ids and references to them a prefix, since several drawings share a page."""
    body = re.sub(r'(<[^<>]*?\sid=")', rf"\g<1>{key}-", body)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{key}-", body).replace("xlink:href=", "href=")


def _recoloured(body: str) -> str:
    """Puts the custom properties of the page in the place of the light colours."""
    for role, colour in LIGHT.items():
        body = re.sub(rf"{colour}\b", f"var(--{role})", body, flags=re.IGNORECASE)
    return body
