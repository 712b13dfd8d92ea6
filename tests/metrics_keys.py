"""Keys of metrics.json: those that a tree has, and those that docs/metrics.md explains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
# Names that an experiment chooses stand as <what they are>.
CHOSEN = {
    "outcomes": "outcome",
    "arms[].outcomes": "outcome",
    "arms[].outcomes.<outcome>.by_seed": "seed",
    "completions": "arm",
    "overhead": "arm",
    "training": "cell",
    "cells": "cell",
    "drift.stores": "cell",
    "artifacts.adapters": "cell",
    "versions": "package",
}
WHOLE = (
    "config",
    "direction",
    "arms[].matched_in.draws",
    "trade_off_others",
    "circuits.graph",
    *(f"circuits.made[].{key}" for key in ("nodes", "neurons", "terms", "ablation")),
)  # explained as one


def documented() -> set[str]:
    """Keys in the tables of docs/metrics.md."""
    return set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.M))


def keys(node: Any, name: str = "") -> Iterator[str]:
    """Paths to every value of a tree: `arms[].outcomes.<outcome>.ci`."""
    if isinstance(node, dict) and name not in WHOLE:
        for key, inner in node.items():
            yield from keys(inner, f"{name}.<{CHOSEN[name]}>" if name in CHOSEN else f"{name}.{key}".lstrip("."))
    elif isinstance(node, list | tuple) and name not in WHOLE and any(isinstance(inner, dict) for inner in node):
        for inner in node:
            yield from keys(inner, f"{name}[]")
    elif node not in ({}, [], ()) or name not in CHOSEN:
        yield name


def undocumented(tree: Any) -> set[str]:
    """Keys of a tree that the page does not explain; one that is empty or null counts as explained when what it may hold is."""
    explained = documented()
    return {key for key in keys(tree) if key not in explained and not any(each.startswith((f"{key}[].", f"{key}.")) for each in explained)}
