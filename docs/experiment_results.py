"""The tables of docs/results/experiments.md, from docs/results/experiments.json, which holds what finished runs of `steer ab` found.

steer ab experiment=prompt_vs_vector folder=outputs/prompt_vs_vector
python docs/experiment_results.py outputs/prompt_vs_vector [more folders ...]    # then python docs/make_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "experiments.json"
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def quoted(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    seeds = " ".join(["steer ab", f"experiment={metrics['experiment']}", *_seeds(metrics)])
    return {
        "command": seeds,
        "started": metrics["started"][:10],
        "seconds": metrics["seconds"],
        "versions": {name: metrics["versions"][name] for name in ("torch", "transformers")},
        "question": metrics["question"]["text"],
        "confirmatory": metrics["design"]["lock"]["confirmatory"],
        "verdict": metrics["verdict"],
        "contrasts": [contrast["verdict"] for contrast in metrics["contrasts"]],
        "guardrails": [guardrail["verdict"] for guardrail in metrics["guardrails"]],
        "specificity": (metrics["specificity"] or {}).get("verdict"),
        "cells": len(metrics["cells"]),
    }


def _seeds(metrics: dict[str, Any]) -> list[str]:
    seeds, most = metrics["design"]["seeds"], metrics["config"]["draws"]
    return [*([f"seeds={seeds}".replace(" ", "")] if seeds != [0] else []), *([] if most is None else [f"draws={most}"])]


def runs(markdown: Markdown) -> str:
    head = ("command", "verdict", "the contrast that decides", "cells, seconds")
    return markdown(
        head,
        [(f"`{run['command']}`", run["verdict"], run["contrasts"][0], f"{run['cells']}, {run['seconds']:.0f}") for run in read().values()],
    )


def details(_: Markdown) -> str:
    sections = []
    for name, run in read().items():
        lines = [*run["contrasts"][1:], *run["guardrails"], *([run["specificity"]] if run["specificity"] else [])]
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        standing = "locked before the first cell" if run["confirmatory"] else "not locked: exploratory"
        listed = "\n".join(f"- {line}" for line in lines)
        sections.append(f"### {name}\n\n{run['question']} ({run['started']}, {versions}, {standing})\n\n{listed}")
    return "\n\n".join(sections)


def main() -> None:
    kept = read() if RESULTS.is_file() else {}
    for folder in sys.argv[1:]:
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        kept[metrics["experiment"]] = quoted(metrics)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
