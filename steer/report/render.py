"""Rendering of a page: a template with the style of the report, as one HTML file that loads nothing."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from steer.files import atomic_write
from steer.report import numbers, palette
from steer.report.extra import extra


def markup() -> Any:
    """What marks text as HTML, which templates then take as it is. Raises ConfigError where jinja2 is missing."""
    return extra("markupsafe").Markup


def write_page(path: str | Path, template: str, **content: Any) -> Path:
    """Writes a template, filled in; an existing file is replaced as a whole, and a missing folder made.

    Raises:
        ConfigError: jinja2 is missing. StorageFullError.
    """
    jinja = extra("jinja2")
    environment = jinja.Environment(loader=jinja.PackageLoader("steer.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(numbers, name) for name in ("number", "overhead", "duration", "moment")}
    style = (files("steer.report") / "style.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(style=markup()(f"{palette.css()}\n{style}"), **content)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return path
