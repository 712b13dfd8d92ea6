"""Tables of docs/results/speed.md, made from what benchmarks/steering.py measured last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from steering import PEERS, cell, ratio  # noqa: E402

Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def read() -> dict[str, Any]:
    return json.loads(max((BENCHMARKS / "results").glob("*_cpu_steering.json")).read_text(encoding="utf-8"))


def setting(_: Markdown) -> str:
    found = read()
    given, versions = found["arguments"], found["versions"]
    return (
        f"Measured on {found['date']} on a CPU, {given['threads']} thread, {given['rounds']} rounds, torch {versions['torch']}, "
        f"transformers {versions['transformers']} where a peer allows it."
    )


def against_plain(markdown: Markdown) -> str:
    """Each arm's time beside the plain model's; for extraction beside that of a forward hook on whole passes."""
    found = read()["measurements"]
    names = list(found["plain"])
    return markdown(
        ("", *names),
        [
            (arm, *(cell(ratio(row[name], found["hook" if "extract" in name else "plain"][name])) for name in names))
            for arm, row in found.items()
            if arm != "plain"
        ],
    )


def against_steer(markdown: Markdown) -> str:
    """steer's time and memory as a share of each peer's."""
    read_in = read()
    found, memory = read_in["measurements"], read_in["peak_and_added_mb"]
    names = list(found["plain"])
    return markdown(
        ("peer", "version", *names, "memory added"),
        [
            (
                arm,
                read_in["arms"][arm].get(arm, ""),
                *(cell(ratio(found["steer"][name], row[name])) for name in names),
                f"{memory['steer'][1] / memory[arm][1]:.2f}",
            )
            for arm, row in found.items()
            if arm in PEERS
        ],
    )
