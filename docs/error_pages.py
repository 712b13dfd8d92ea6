"""Pages of the error classes: what each means, what helps, which functions raise it, and every message that the code can give.

The messages are read from the calls that build the errors: words are as they stand in the code, `{...}` is what a call fills in.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from public_names import ROOT, Source

PARTS = ("expected", "found", "remedy")
INTRODUCTION = (
    "Every error that the library raises on purpose says what is wrong, what was expected, what was found and what to do. "
    "It derives from `steer.SteerError`."
)


class Message(NamedTuple):
    """One call that builds an error; each part as the code has it, with `{expression}` for what is filled in."""

    error: str
    file: str
    what: str
    expected: str
    found: str
    remedy: str


def error_classes(source: Source) -> dict[str, tuple[str, ast.ClassDef]]:
    """Class name -> module and definition, of SteerError and everything derived from it, bases first."""
    classes = {node.name: (module, node) for module, tree in source.modules.items() for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {"SteerError": classes["SteerError"]}
    while True:
        further = {
            name: place
            for name, place in classes.items()
            if name not in found and not name.startswith("_") and any(ast.unparse(base) in found for base in place[1].bases)
        }
        if not further:
            return found
        found |= further


def messages(source: Source) -> list[Message]:
    """Every message, in the order of the files."""
    known, found = error_classes(source), []
    for module, tree in source.modules.items():
        for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
            texts = _local_texts(scope)
            for node in _own_nodes(scope):
                parts = {keyword.arg: keyword.value for keyword in node.keywords} if isinstance(node, ast.Call) else {}
                if set(PARTS) <= set(parts) and node.args and ast.unparse(node.func) in known:
                    values = [node.args[0], *(parts[part] for part in PARTS)]
                    found.append(Message(ast.unparse(node.func), source.file_of(module), *(template(value, texts) for value in values)))
    return found


def template(value: ast.expr, texts: dict[str, ast.expr]) -> str:
    """The text of a string or f-string with `{expression}` for what is filled in; `texts` are those that local names stand for."""
    if isinstance(value, ast.Name) and value.id in texts:
        return template(texts[value.id], {})
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(template(part.value if isinstance(part, ast.FormattedValue) else part, texts) for part in value.values)
    return f"{{{ast.unparse(value)}}}"


def _local_texts(scope: ast.AST) -> dict[str, ast.expr]:
    """The strings that a function gives a name once."""
    given = defaultdict(list)
    for node in _own_nodes(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given[node.targets[0].id].append(node.value)
    return {name: values[0] for name, values in given.items() if len(values) == 1 and isinstance(values[0], ast.Constant | ast.JoinedStr)}


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Everything in a module or function but what is in functions within it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from _own_nodes(node)


def error_pages(source: Source) -> dict[str, str]:
    """Address -> Markdown, the table of all of them first."""
    classes, raisers, built = error_classes(source), raised_by(source), defaultdict(list)
    for message in messages(source):
        built[message.error].append(message)
    rows = "\n".join(f"| [{name}]({name}.md) | {first_line(node)} |" for name, (_, node) in sorted(classes.items()))
    pages = {"errors/index.md": f"# Errors\n\n{INTRODUCTION}\n\n| error | when |\n| --- | --- |\n{rows}\n"}
    for name, (module, _) in sorted(classes.items()):
        pages[f"errors/{name}.md"] = "\n\n".join(
            [f"# {name}", f"::: {module}.{name}\n    options: {{show_root_heading: false, heading_level: 2}}", _helps(name)]
            + _raisers(raisers[name])
            + _messages(built[name])
        )
    return pages


def first_line(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")


def raised_by(source: Source) -> dict[str, list[str]]:
    """Error -> paths of the public callables, and of methods of public classes, whose docstring lists it."""
    found = defaultdict(list)
    for name in source.public:
        module, _, short = name.path.rpartition(".")
        for path, docstring in _docstrings(source.modules[module], short):
            block = docstring.partition("Raises:\n")[2].partition("\n\n")[0]
            for error in dict.fromkeys(re.findall(r"\b\w+Error\b", block)):
                found[error].append(f"[`{name.title}{path}`][{name.path}{path}]")
    return found


def _docstrings(module: ast.Module, short: str) -> Iterator[tuple[str, str]]:
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == short:
            yield "", ast.get_docstring(node) or ""
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f".{inner.name}", ast.get_docstring(inner) or ""


def _helps(name: str) -> str:
    """The section of the troubleshooting page."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {name}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    helps = section[1].strip() if section else "Catch it to catch every error that the library raises on purpose."
    return "## What helps\n\n" + re.sub(r"\]\((?!https)([^)#]*\.md)", r"](../\1", helps)


def _raisers(names: list[str]) -> list[str]:
    return ["## Raised by", ", ".join(names)] if names else []


def _messages(found: list[Message]) -> list[str]:
    """Collapsed, file by file: the search finds the words of a message that was met."""
    if not found:
        return []
    parts = ["## Messages", "Every message of this class, as the code has it; `{...}` is what a call fills in."]
    by_file = defaultdict(list)
    for message in found:
        by_file[message.file].append(message)
    for file, here in by_file.items():
        rows = "\n".join(f"    | {_cell(each.what)} | {_cell(each.expected)} | {_cell(each.remedy)} |" for each in dict.fromkeys(here))
        parts.append(f'??? note "{file}"\n\n    | what | expected | remedy |\n    | --- | --- | --- |\n{rows}')
    return parts


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;").replace("\n", " ")
    return re.sub(r"([*_\[\]])", r"\\\1", escaped)
