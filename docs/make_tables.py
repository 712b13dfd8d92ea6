"""Writes the tables of the documentation that the code knows best: methods, sites, scopes.

    python docs/make_tables.py

Each table stands between `<!-- <name>:begin -->` and `<!-- <name>:end -->`; a test fails when one is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import drift_tables
import result_tables
import speed_tables

from steer.commands.info import methods
from steer.intervene.scope import KINDS
from steer.model.site import LAYER_PARTS, MODEL_PARTS

ROOT = Path(__file__).resolve().parents[1]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    rows = [(kind, f"`{name}`", what) for kind, entries in sorted(methods().items()) for name, what in entries]
    return markdown(("kind", "name", "what it does"), rows)


def sites_table() -> str:
    parts = [(f"`layers.<n>.{part}`", what) for part, what in LAYER_PARTS.items()] + [
        (f"`{part}`", what) for part, what in MODEL_PARTS.items()
    ]
    other = ("`module:<dotted path>:<input|output>`", "any module of any model")
    return markdown(("site", "tensor"), [*parts, other])


def scopes_table() -> str:
    return markdown(("scope", "tokens"), [(f"`{name}`", what) for name, what in KINDS.items()])


# (file, name of the table) -> what makes it
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "methods"): methods_table,
    ("docs/concepts.md", "sites"): sites_table,
    ("docs/concepts.md", "scopes"): scopes_table,
    ("docs/drift.md", "metrics"): lambda: drift_tables.metrics(markdown),
    ("docs/results/steering.md", "command"): lambda: result_tables.command(markdown),
    ("docs/results/steering.md", "effects"): lambda: result_tables.effects(markdown),
    ("docs/results/steering.md", "successor"): lambda: result_tables.successor(markdown),
    ("docs/results/speed.md", "setting"): lambda: speed_tables.setting(markdown),
    ("docs/results/speed.md", "against_steer"): lambda: speed_tables.against_steer(markdown),
    ("docs/results/speed.md", "against_plain"): lambda: speed_tables.against_plain(markdown),
    ("docs/results/speed.md", "hook_cost"): lambda: speed_tables.hook_cost(markdown),
    ("docs/results/speed.md", "growth"): lambda: speed_tables.growth(markdown),
}


def between(text: str, name: str, content: str) -> str:
    """`text` with new content between the two markers of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected one '{begin}' and one '{end}'")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def updated() -> dict[Path, str]:
    """Every file that holds a table, as it should be."""
    texts: dict[Path, str] = {}
    for (file, name), make in TABLES.items():
        path = ROOT / file
        texts[path] = between(texts.get(path) or path.read_text(encoding="utf-8"), name, make())
    return texts


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
