"""MkDocs hook: links of pages that are also read beside the code, and links from names to the reference."""

from __future__ import annotations

import posixpath
import re
from functools import cache

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from public_names import package

TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|^ *:::.*?(?=^\S|\Z)|^#.*?$|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri == "index.md":
        page.meta.setdefault("hide", ["navigation"])  # it has no neighbours
    return with_reference(within_the_site(markdown, page.file.src_uri))


def within_the_site(markdown: str, address: str) -> str:
    """Links to the top of the repository lead to its page of the site; those to code become the path, in code font."""

    def replaced(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        file, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(address), file))
        if path.startswith("docs/"):
            return link[0]
        if path in TOP:
            return f"{image}[{text}]({posixpath.relpath(TOP[path], posixpath.dirname(address) or '.')}{'#' * bool(anchor)}{anchor})"
        return text if f"`{path}`" == text else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def with_reference(markdown: str) -> str:
    """A public name in code font leads to its entry in the reference, the first time that a page has it outside a link."""
    seen: set[str] = set()
    linked = [match.span() for match in re.finditer(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\](?:\(|\[)", markdown)]

    def replaced(code: re.Match[str]) -> str:
        name = code[0].strip("`").removesuffix("()").partition("(")[0]
        inside_a_link = any(start <= code.start() < end for start, end in linked)
        if not code[0].startswith("`") or code[0].startswith("```") or inside_a_link or name in seen or name not in public_paths():
            return code[0]
        seen.add(name)
        return f"[{code[0]}][{public_paths()[name]}]"

    return CODE.sub(replaced, markdown)


@cache
def public_paths() -> dict[str, str]:
    return {path: name.path for name in package().public for path in (*name.exports, name.path)}
