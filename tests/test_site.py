"""The documentation site: what its pages are made of is complete and true. `make docs` builds it, and checks the built pages."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from functools import cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_docs import ROOT, error_names, script

import steer
from steer.registry import REGISTRIES

FIELDS = ("what", "expected", "found", "remedy")

needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: torchsteer[docs]")


@cache
def source() -> Any:
    return script("public_names").package()


def hook(name: str) -> ModuleType:
    """A hook of the build with its siblings."""
    for sibling in ("public_names", "docstring_sections", "error_pages", "notebook_pages", "site_pages"):
        script(sibling)
    return script(name)


# ---- the reference


def at(path: str) -> Any:
    """What a dotted path leads to; the last part is an attribute, for functions are called like their modules."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_exported_name_is_public_and_traced_to_where_it_is_defined() -> None:
    public = {path: name for name in source().public for path in name.exports}
    rooms = ("bias", "callbacks", "circuits", "directions", "drift", "edits", "features", "kernels", "lens", "report")
    for room in (steer, *(importlib.import_module(f"steer.{room}") for room in rooms)):
        assert {f"{room.__name__}.{name}" for name in room.__all__ if not name.startswith("__")} <= set(public), room.__name__
    for path, name in public.items():
        value = reduce(getattr, path.split(".")[1:], steer) if path.count(".") == 1 else at(path)
        assert value is at(name.path), f"{path} is not {name.path}"


def test_every_registered_class_and_function_of_the_package_is_public() -> None:
    paths = {name.path for name in source().public}
    for kind, registry in REGISTRIES.items():
        for method in registry:
            entry = registry.get(method)
            if isinstance(entry, type) or hasattr(entry, "__qualname__"):
                path = f"{entry.__module__}.{entry.__qualname__}"
                # entries of tests are of other packages; one that a call registers is a variant of a class that is public
                assert path in paths or not path.startswith("steer.") or "<" in path, f"{kind} '{method}': {path}"


def test_the_reference_has_every_public_name_once() -> None:
    pages = hook("site_pages").api_pages(source())
    text = "\n".join(pages.values())
    for name in source().public:
        assert len(re.findall(rf"^::: {re.escape(name.path)}$", text, re.M)) == (name.room != "errors"), name.path


@needs_mkdocs
def test_methods_by_name_say_how_they_are_used_and_where_they_come_from() -> None:
    pages = {address: text for address, text in hook("site_pages").api_pages(source()).items() if address.endswith("_methods.md")}
    kinds = [kind for text in pages.values() for kind in text.split("\n## ")[1:]]
    assert len(kinds) > 20 and all("\nHow they are used: [" in kind.partition("\n::: ")[0] for kind in kinds)
    assert "Source: Contrast-consistent search, CCS (Burns et al. 2022" in pages["api/directions_methods.md"]


@pytest.mark.parametrize(
    ("house", "google"),
    [
        ("Clamps.\n\nArgs:\n    low, high: bounds of\n        the values.", "low: bounds of\n        the values.\n    high: bounds of"),
        ("Loads.\n\nRaises:\n    FileError: gone.\n    ConfigError, SiteError.", "steer.errors.SiteError: A site that"),
        ("Reads.\n\nRaises:\n    As `steer.capture`.", "Raises:\n    steer.errors.SteerError: As `steer.capture`."),
        ("Adds.\n\nExample:\n    >>> 1 < 2\n    True", "Examples:\n    >>> 1 < 2"),
        ("Adds.\n\nExample:\n    steer.load()", "```python\n    steer.load()\n    ```"),
        ("Sum of <a, b> in `x < y`.", "Sum of &lt;a, b> in `x < y`."),
    ],
)
def test_docstrings_are_read_as_the_house_writes_them(house: str, google: str) -> None:
    pytest.importorskip("griffe")
    assert google in hook("docstring_sections").in_google_style(house)


# ---- errors


def test_every_error_has_a_page() -> None:
    pages = hook("error_pages").error_pages(source())
    assert set(pages) == {f"errors/{name}.md" for name in error_names() | {"SteerError", "index"}}
    for name in error_names():
        assert f"[{name}]({name}.md)" in pages["errors/index.md"]
        assert "## What helps" in pages[f"errors/{name}.md"] and "## Messages" in pages[f"errors/{name}.md"], name
    assert "[`steer.extract`][steer.directions.extract.extract]" in pages["errors/ContrastError.md"]


def shown_messages() -> list[dict[str, str]]:
    """The messages of the troubleshooting page: error, what, expected, found, remedy."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pattern = re.compile(r"(?P<error>\w+): (?P<what>.*)\n  expected: (?P<expected>.*)\n  found: (?P<found>.*)\n  remedy: (?P<remedy>.*)\n")
    return [pattern.fullmatch(block).groupdict() for block in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)]


@cache
def messages() -> list[Any]:
    return hook("error_pages").messages(source())


def literal(template: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", template)


def can_be(template: str, text: str) -> bool:
    """Whether an f-string gives a text: its words are there, in their order."""
    parts = re.split(r"\{(?:[^{}]|\{[^{}]*\})+\}", template)
    return re.fullmatch(".*?".join(map(re.escape, parts)), text) is not None


def test_every_error_shows_a_message() -> None:
    assert {message["error"] for message in shown_messages()} == error_names()


@pytest.mark.parametrize("message", shown_messages(), ids=lambda message: message["error"])
def test_a_shown_message_is_one_that_the_code_can_give(message: dict[str, str]) -> None:
    built = [each for each in messages() if each.error == message["error"]]
    fitting = [each for each in built if all(can_be(getattr(each, part), message[part]) for part in FIELDS)]
    assert any(len(literal(each.what)) > 8 for each in fitting), f"no call of the code gives {message}"


def test_a_message_that_the_code_does_not_give_is_found_out() -> None:
    assert can_be("layer of '{site}' is out of range", "layer of 'layers.40.output' is out of range")
    assert not can_be("layer of '{site}' is out of range", "layer of 'layers.40.output' is too large")


def test_quoted_warnings_of_the_troubleshooting_page_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    files = [file for folder in ("steer", "callbacks", "kernels") for file in (ROOT / folder).rglob("*.py")]
    code = " ".join(file.read_text(encoding="utf-8") for file in files)
    quoted = re.findall(r'^- \*"([^"]+)"\*', page, re.M)
    assert quoted and all(words in re.sub(r'"\s*f?"', "", code) for words in quoted)


# ---- links, navigation, notebooks


@needs_mkdocs
@pytest.mark.parametrize(
    ("address", "written", "on_the_site"),
    [
        ("drift.md", "[a](../README.md)", "[a](index.md)"),
        ("results/speed.md", "[a](../../CONTRIBUTING.md#the-house)", "[a](../contributing.md#the-house)"),
        ("drift.md", "[`steer/model`](../steer/model)", "`steer/model`"),
        ("drift.md", "[it](../examples/loop.py)", "it (`examples/loop.py`)"),
        ("drift.md", "[a](files.md#drift-store) [b](https://example.org)", "[a](files.md#drift-store) [b](https://example.org)"),
    ],
)
def test_links_out_of_the_documentation(address: str, written: str, on_the_site: str) -> None:
    assert hook("site_links").within_the_site(written, address) == on_the_site


@needs_mkdocs
def test_a_public_name_leads_to_the_reference_once_and_not_inside_code_or_links() -> None:
    links = hook("site_links")
    link = "[`steer.extract`][steer.directions.extract.extract]"
    assert links.with_reference("`steer.extract` and `steer.extract`") == f"{link} and `steer.extract`"
    for untouched in ("```python\n`steer.extract`\n```\n", "[`steer.extract`](directions.md)", "# `steer.extract`", "`steer.nothing`"):
        assert links.with_reference(untouched) == untouched


@needs_mkdocs
def test_the_navigation_takes_what_is_there() -> None:
    filled = hook("site_pages").filled
    nav = [{"Home": "index.md"}, {"Guides": "guides/*.md"}, {"More": ["a.md", {"Deep": ["gone.md"]}, "*.md"]}, {"None": "none/*.md"}]
    written = {"index.md", "guides/b.md", "guides/a.md", "a.md", "z.md"}
    assert filled(nav, written, {}) == [{"Home": "index.md"}, {"Guides": ["guides/a.md", "guides/b.md"]}, {"More": ["a.md", "z.md"]}]


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": ["2\n"]}
    picture = {"output_type": "display_data", "data": {"image/png": "aGk=\n", "text/plain": ["<Figure>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Steer\n", "[a](../docs/drift.md)"]},
        {"cell_type": "code", "source": ["print(2)"], "outputs": [stream, picture]},
    ]
    (tmp_path / "steer.ipynb").write_text(json.dumps({"cells": cells}))
    page = script("notebook_pages").notebook_page(tmp_path / "steer.ipynb")
    assert page.startswith("# Steer\n[a](../drift.md)\n\n````python\nprint(2)\n````\n\n````\n2\n````\n\n<img ")
    assert 'src="data:image/png;base64,aGk="' in page and "<Figure>" not in page


# ---- the checks of the build


@needs_mkdocs
def test_the_build_finds_other_hosts_dead_links_missing_names_and_unwanted_files(tmp_path: Path) -> None:
    checks = hook("site_checks")
    bad = '<script src="https://cdn.org/a.js"></script><a href="https://example.org">ok</a><link rel=stylesheet href=//fonts.org/x.css>'
    assert len(list(checks.outside_hosts({"a.html": bad}, {"a.css": "b{src:url(https://fonts.org/f)} c{src:url(f.woff)}"}))) == 3
    page = '<h2 id="here"></h2><a href="#here"></a><a href="#gone"></a><a href="b.html"></a><a href="a.html#here"></a><a href="mailto:a@b">'
    (tmp_path / "a.html").write_text(page)
    assert list(checks.dead_links({"a.html": page}, tmp_path)) == [
        "a.html: links to #gone, and there is no such place",
        "a.html: links to b.html",
    ]
    (tmp_path / "demo.json").write_text("{}")
    assert list(checks.unwanted_files(tmp_path)) == ["demo.json: is no part of the site"]
    missing = list(checks.missing_names(source(), {"api/x.html": '<h3 id="steer.directions.extract.extract">and nothing said</h3>'}))
    assert len(missing) == len(source().public)
    assert "steer.extract: its entry lacks the first line of the docstring of steer.directions.extract.extract" in missing
