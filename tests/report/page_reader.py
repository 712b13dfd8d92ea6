"""Reads a page as its readers do: the text of every section, the cells of every row, tags with attributes."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from steer.report import write_report

SECTIONS = ["result", "cost", "dose", "drift", "completions", "items", "contrasts", "training", "caveats", "reading", "provenance"]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a reader of the page needs from it. said: titles under the pointer."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self.section = "head"
        self.unbalanced: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "title" and "svg" in self.open:
            self.said.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open and self.open[-1] == "title" and "svg" in self.open:
            self.said[-1] += data
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())

    def row(self, *starts: str) -> list[str]:
        """The first row whose first cells begin like this."""
        return next(row for row in self.rows if len(row) >= len(starts) and all(map(str.startswith, row, starts)))

    def words(self, section: str) -> str:
        """Text of a section with single spaces."""
        return " ".join(self.text.get(section, "").split())


def render(tmp_path: Path, metrics: dict[str, Any], drift: Any = None) -> tuple[str, Page]:
    html = write_report(tmp_path / "out" / "report.html", metrics, drift or {}).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.unbalanced and not page.open
    return html, page
