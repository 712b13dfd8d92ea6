"""MkDocs hook: what has to be true of the built site. The build fails where it is not.

Every public name is there with its docstring; no page takes a script, a style, a font or a picture from another host; every link within the
site leads to a page and a place on it; nothing is published that only makes pages.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from public_names import PublicName, Source, package
from site_pages import first_line

TAG = re.compile(r"<(script|link|img|iframe|source|video|audio|object|embed|a)\b[^>]*>", re.I)
ADDRESS = re.compile(r'\b(?:src|href|data)="([^"]*)"|\b(?:src|href|data)=([^\s">]+)')
ANCHOR = re.compile(r'\b(?:id|name)="([^"]*)"|\bid=([^\s">]+)')
ELSEWHERE = re.compile(r"(?:https?:)?//")


@event_priority(-200)  # after the last plugin has written what it writes
def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    pages = {file.relative_to(site).as_posix(): file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.html"))}
    styles = {file.relative_to(site).as_posix(): file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.css"))}
    faults = [*missing_names(package(), pages), *outside_hosts(pages, styles), *dead_links(pages, site), *unwanted_files(site)]
    if faults:
        raise PluginError(f"{len(faults)} faults of the built site:\n" + "\n".join(faults))


def missing_names(source: Source, pages: dict[str, str]) -> Iterator[str]:
    """Public names without an entry of their own, or whose entry lacks the first line of the docstring."""
    reference = {address: (anchors(text), words(text)) for address, text in pages.items() if address.startswith(("api/", "errors/"))}
    for name in source.public:
        entries = [text for ids, text in reference.values() if name.path in ids]
        if not entries:
            yield f"{name.title}: no page of the reference has it"
        elif not any(words(_rendered(source, name)) in text for text in entries):
            yield f"{name.title}: its entry lacks the first line of the docstring of {name.path}"


def _rendered(source: Source, name: PublicName) -> str:
    """The first line of the docstring without its Markdown."""
    return html.escape(re.sub(r"\[[^\]]*\]\([^)]*\)", "", first_line(source, name).replace("\\|", "|")))


def words(text: str) -> str:
    """The letters and digits of a page without its tags."""
    return re.sub(r"\W+", "", html.unescape(re.sub(r"<[^>]*>", "", text)).replace("_", ""))


def outside_hosts(pages: dict[str, str], styles: dict[str, str]) -> Iterator[str]:
    for address, text in pages.items():
        for tag in TAG.finditer(text):
            if tag[1].lower() != "a" and 'rel="canonical"' not in tag[0]:
                yield from (f"{address}: takes {found} from another host" for found in _addresses(tag[0]) if ELSEWHERE.match(found))
    for address, text in styles.items():
        for found in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text):
            yield from (f"{address}: takes {each} from another host" for each in found if ELSEWHERE.match(each))


def dead_links(pages: dict[str, str], site: Path) -> Iterator[str]:
    """Links within the site that lead to no file, or to no place of it."""
    known = {address: anchors(text) for address, text in pages.items()}
    for address, text in pages.items():
        for found in sorted({found for tag in TAG.finditer(text) for found in _addresses(tag[0])}):
            if re.match(r"[a-z]+:|//", found) or address == "404.html":
                continue
            file, _, anchor = found.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(address), unquote(file.partition("?")[0]))) if file else address
            if not (site / target).exists():
                yield f"{address}: links to {found}"
            elif anchor and target in known and unquote(anchor) not in known[target] | {"__codelineno", "__top"}:
                yield f"{address}: links to {found}, and there is no such place"


def _addresses(tag: str) -> list[str]:
    return [html.unescape(quoted or bare) for quoted, bare in ADDRESS.findall(tag) if quoted or bare]


def anchors(text: str) -> set[str]:
    return {html.unescape(quoted or bare) for quoted, bare in ANCHOR.findall(text)}


def unwanted_files(site: Path) -> Iterator[str]:
    made = {"search_index.json", "objects.inv"}
    for file in sorted(site.rglob("*")):
        if file.suffix in (".py", ".pyc", ".ipynb") or (file.suffix == ".json" and file.name not in made):
            yield f"{file.relative_to(site)}: is no part of the site"
