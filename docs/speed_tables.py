"""Tables of docs/results/speed.md, made from what benchmarks/steering.py, overhead.py and scaling.py measured last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import overhead  # noqa: E402
import scaling  # noqa: E402
from steering import PEERS, cell, ratio  # noqa: E402

RESULTS = BENCHMARKS / "results"
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def read() -> dict[str, Any]:
    return json.loads(max(RESULTS.glob("*_cpu_steering.json")).read_text(encoding="utf-8"))


def newest(name: str) -> dict[str, Any] | None:
    """The newest record of a benchmark; None where there is none yet."""
    files = sorted(RESULTS.glob(f"*_cpu_{name}.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def setting(_: Markdown) -> str:
    results = read()
    arguments, versions = results["arguments"], results["versions"]
    return (
        f"Measured on {results['date']} on a CPU, {arguments['threads']} thread, {arguments['rounds']} rounds, torch {versions['torch']}, "
        f"transformers {versions['transformers']} where a peer allows it."
    )


def against_plain(markdown: Markdown) -> str:
    """Each arm's time beside the plain model's; for extraction beside that of a forward hook on whole passes."""
    measurements = read()["measurements"]
    names = list(measurements["plain"])
    return markdown(
        ("", *names),
        [
            (arm, *(cell(ratio(row[name], measurements["hook" if "extract" in name else "plain"][name])) for name in names))
            for arm, row in measurements.items()
            if arm != "plain"
        ],
    )


def against_steer(markdown: Markdown) -> str:
    """steer's time and memory as a share of each peer's."""
    read_in = read()
    measurements, memory = read_in["measurements"], read_in["peak_and_added_mb"]
    names = list(measurements["plain"])
    return markdown(
        ("peer", "version", *names, "memory added"),
        [
            (
                arm,
                read_in["arms"][arm].get(arm, ""),
                *(cell(ratio(measurements["steer"][name], row[name])) for name in names),
                f"{memory['steer'][1] / memory[arm][1]:.2f}",
            )
            for arm, row in measurements.items()
            if arm in PEERS
        ],
    )


def hook_cost(markdown: Markdown) -> str:
    """Microseconds per site and token of every edit, and what the additions add to a decode step."""
    record = newest("overhead")
    if record is None:
        return _not_measured("overhead")
    results = record["results"]
    shares = {name: results["edits"]["add"].get(f"{name} % of step") for name in ("hand", "before", "now")}
    steered, by_hand, before = (share and f"{share['median']:.1f} %" for share in (shares["now"], shares["hand"], shares["before"]))
    earlier = f", {before} in {record['commits']['before']}" if before else ""
    repeated = results["A/A % of step"]
    head = ("edit", "by hand", "before", "now", "goal", "now / hand", "before, % of a step", "now, % of a step")
    edits = [(overhead.EDITS[edit][0], *overhead.cells(row)) for edit, row in results["edits"].items()]
    peers = [
        (f"add a vector, {peer}", "", "", overhead.microseconds(figures), "", "", "", overhead.percent(results["peers % of step"][peer]))
        for peer, figures in results["peers"].items()
    ]
    paragraphs = (
        f"**{results['sites']} additions take {steered} of a decode step** ({by_hand} by hand{earlier}).",
        markdown(head, [*edits, *peers]),
        f"{_measured(record)} A step takes {results['step ms']['median']:.0f} ms. Of each call of a hook, "
        f"{results['empty hook us']['median']:.1f} µs are taken off, what an empty one takes. The same hook measured twice differs by "
        f"{repeated['median']:+.2f} % of a step (95 % interval {repeated['low']:+.2f} to {repeated['high']:+.2f}).",
    )
    return "\n\n".join(paragraphs)


def growth(markdown: Markdown) -> str:
    """What grows with interventions, sites, row slots and cached tokens."""
    record = newest("scaling")
    if record is None:
        return _not_measured("scaling")
    head = ("what", "unit", "before", "now", "goal", "now / before")
    return f"{markdown(head, [scaling.cells(row) for row in record['results'].values()])}\n\n{_measured(record)}"


def _measured(record: dict[str, Any]) -> str:
    versions, commits, arguments = record["versions"]["now"], record["commits"], record["arguments"]
    compared = f"; before is {commits['before']}" if commits["before"] else ""
    return (
        f"Measured on {record['date']} on a CPU, {arguments['threads']} thread, {arguments['rounds']} rounds, torch {versions['torch']}, "
        f"transformers {versions['transformers']}{compared}; in brackets the smallest and the largest round."
    )


def _not_measured(name: str) -> str:
    return f"Not measured for this version yet: `python benchmarks/{name}.py --against PATH` does."
