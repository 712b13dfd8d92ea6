"""Griffe extension: reads the habits of the house's docstrings that Google's format does not have.

- `low, high: ...` describes several arguments at once; each gets the words.
- `Raises:` may end in a bare list, `ConfigError, SiteError.`, of errors that need no further words: each gets the first line of its class.
  It may also refer to another function, `As steer.capture.`: those are errors of the library, whichever they are.
- `Example:` is the section that griffe calls `Examples:`; its code may do without prompts.
- A formula such as `<dz, r>` is no tag of HTML.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ERRORS = Path(__file__).resolve().parents[1] / "steer" / "errors.py"
NAMES = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)+)(:.*)$", re.S)
ERROR_NAMES = re.compile(r"\w+(?:Error|Warning)(?:(?:,| and) \w+(?:Error|Warning))*\.?$")


class HouseSections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_google_style(obj.docstring.value)


def in_google_style(docstring: str) -> str:
    """The same docstring as Google's format has it; it begins at column 0, as `inspect.cleandoc` leaves it."""
    sections = re.split(r"\n\n(?=\w+:\n)", docstring)
    return "\n\n".join(_section(text) for text in sections)


def _section(text: str) -> str:
    title, _, body = text.partition(":\n")
    if title == "Example":
        return f"Examples:\n{body}" if ">>>" in body else f"Examples:\n    ```python\n{body.rstrip()}\n    ```"
    body, text = without_tags(body), without_tags(text)
    if title in ("Args", "Attributes"):
        return _with_items(title, body, _argument)
    if title == "Raises":
        return _with_items(title, body, _error)
    return text


def without_tags(text: str) -> str:
    """The text with `<` escaped outside code font."""
    return re.sub(r"`[^`]*`|<", lambda found: "&lt;" if found[0] == "<" else found[0], text)


def _with_items(title: str, body: str, rewritten: Any) -> str:
    block, gap, after = body.partition("\n\n")
    items = re.split(r"\n(?=    \S)", block)
    return f"{title}:\n" + "\n".join(f"    {line}" for item in items for line in rewritten(item.strip())) + gap + after


def _argument(item: str) -> list[str]:
    shared = NAMES.match(item)
    return [f"{name}{shared[2]}" for name in shared[1].split(", ")] if shared else [item]


def _error(item: str) -> list[str]:
    if ERROR_NAMES.fullmatch(item):
        names = re.findall(r"\w+(?:Error|Warning)", item)
        return [f"{_path(name)}: {_meaning().get(name, 'see its class.')}" for name in names]
    if re.match(r"[\w.]+(?:, [\w.]+)*:", item) is None:
        return [f"{_path('SteerError')}: {item}"]
    return [re.sub(r"^\w+", lambda name: _path(name[0]), line) for line in _argument(item)]


def _path(error: str) -> str:
    """The path by which the reference knows an error, whether or not the module that names it imports it."""
    return f"steer.errors.{error}" if error in _meaning() else error


@cache
def _meaning() -> dict[str, str]:
    """The first line of every class of steer/errors.py."""
    classes = [node for node in ast.parse(ERRORS.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in classes}
