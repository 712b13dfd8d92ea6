"""Tables of docs/results/steering.md, made from the figures that benchmarks/effects.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "steering.json"
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def command(_: Markdown) -> str:
    results = read()
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "transformers"))
    return f"```\n{results['command']}\n```\n\nMeasured on {results['date']}, {versions}, seed {results['seed']}, on a CPU in float32."


def effects(markdown: Markdown) -> str:
    head = ("concept", "site", "AUC", "dose", "before", "effect", "random", "over random", "wrong way", "KL", "perplexity")
    return markdown(head, [_effect(row) for row in read()["rows"] if row["concept"] != "successor"])


def _effect(row: dict[str, Any]) -> list[str]:
    chosen = row["chosen"]
    return [
        row["concept"],
        chosen["site"],
        f"{chosen['auc']:.2f}",
        f"{chosen['dose']:g}" if chosen["within_budget"] else f"{chosen['dose']:g}, over budget",
        f"{row['before']['mean']:+.2f}",
        _interval(row["effect"]),
        f"{min(row['random']):+.3f} to {max(row['random']):+.3f}",
        _interval(row["over_random"]),
        f"{row['wrong_way']:.0%}",
        f"{row['kl']:.3f} ({min(row['random_kl']):.3f} to {max(row['random_kl']):.3f})",
        f"x{row['perplexity_ratio']:.3f}",
    ]


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def successor(markdown: Markdown) -> str:
    row = next(row for row in read()["rows"] if row["concept"] == "successor")
    settings = list(next(iter(row["kinds"].values()))["successor_of_the_other"])
    head = ("kind", "items", "edits", "right unedited", *(f"{name.replace(' x', ' ×')}" for name in settings if name != "unedited"))
    rows = []
    for kind, counts in row["kinds"].items():
        shares = [f"{counts['successor_of_the_other'][name]:.0%}" for name in settings if name != "unedited"]
        rows.append((kind, str(counts["items"]), str(counts["edits"]), f"{counts['successor_unedited']:.0%}", *shares))
    return markdown(head, rows)
