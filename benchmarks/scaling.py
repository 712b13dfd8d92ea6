"""What grows with interventions, sites, row slots and cached tokens, on tiny random models: this checkout beside another one.

    python benchmarks/scaling.py                                  # this checkout
    git worktree add --detach ../before 326ad19
    python benchmarks/scaling.py --against ../before              # and an older commit, in the same rounds
    python benchmarks/scaling.py --quick --out scaling.json        # small sizes: does it run?

Making a plan, attaching and driving it is given in milliseconds of CPU time. What a plan does in a decode step is given in microseconds
inside hooks a step, each call's median over the steps, timed where the hooks run (see overhead.py). Every figure is the median over the
rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from checkouts import BEFORE, NOW, Samples, Start, Worker, WorkerError, common_arguments, interleave, summary, workers_of, write_record
from rich.console import Console
from rich.table import Table

FULL: dict[str, Any] = {
    "interventions": 1000,
    "layers": 126,
    "together": 32,
    "caches": [[1, 128], [1, 131_072], [256, 4096]],
    "rows": [2, 8, 64],
    "repeats": 5,
}
QUICK: dict[str, Any] = {"interventions": 20, "layers": 4, "together": 4, "caches": [[1, 16], [2, 32]], "rows": [2, 4], "repeats": 2}


class Case(NamedTuple):
    """What a case of `workloads/growth.py` measures, its unit, and the goal in it."""

    text: str
    unit: str
    goal: float | None = None


def cases_of(sizes: dict[str, Any]) -> dict[str, Case]:
    """The cases by name, in the order of the table; goals are for the full sizes."""
    count, together = f"{sizes['interventions']:,}", sizes["together"]
    cases = {
        "make": Case(f"make a plan of {count} interventions", "ms", 20),
        "make, interventions too": Case(f"make {count} interventions and a plan of them", "ms"),
        "make, equal names": Case(f"make a plan of {count} interventions with one name", "ms", 20),
        "set_window": Case(f"set_window, {count} interventions", "ms", 2),
        "step": Case(f"step, {count} interventions", "ms"),
        "attach": Case(f"attach and detach, {3 * sizes['layers']} sites", "ms", 45),
        "adds at a site": Case(f"decode, {together} additions at one site", "us"),
        "windows at a site": Case(f"decode, {together} windows of their own at one site", "us"),
    }
    for rows, tokens in sizes["caches"]:
        cases[f"window, cache {rows}x{tokens}"] = Case(f"decode, generated[:n], cache of {rows} x {tokens:,} tokens", "us")
    cases[f"all, cache {rows}x{tokens}"] = Case(f"decode, all tokens, cache of {rows} x {tokens:,} tokens", "us")
    for slots in sizes["rows"]:
        cases[f"row slots {slots}"] = Case(f"decode, 30 sites, {slots} rows with vectors of their own", "us")
    return cases if sizes is FULL else {name: case._replace(goal=None) for name, case in cases.items()}


def results_of(samples: Samples, cases: dict[str, Case]) -> dict[str, Any]:
    """Per case its text, unit and goal, and the summaries of `before` and `now`."""
    return {
        name: {
            **case._asdict(),
            **{label: summary([sample["value"] for sample in samples[label][name]]) for label in (BEFORE, NOW) if label in samples},
        }
        for name, case in cases.items()
    }


def show(results: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    for name in ("what", "unit", "before", "now", "goal", "now / before"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in results.values():
        table.add_row(*cells(row))
    Console(width=140).print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table: what, unit, before, now, goal, now / before."""
    goal = "" if row["goal"] is None else f"{row['goal']:g} {'reached' if row[NOW]['median'] <= row['goal'] else 'missed'}"
    ratio = f"{row[NOW]['median'] / row[BEFORE]['median']:.2f}" if BEFORE in row else ""
    return [row["text"], row["unit"], figure(row.get(BEFORE)), figure(row[NOW]), goal, ratio]


def figure(numbers: dict[str, float] | None) -> str:
    """Median and range, with three digits that count."""
    if numbers is None:
        return ""
    digits = 0 if numbers["median"] >= 100 else 1 if numbers["median"] >= 10 else 2
    median, smallest, largest = (f"{numbers[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({smallest}-{largest})"


def main(argv: Sequence[str] | None = None, start: Start = Worker) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, rounds=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, for which the goals say nothing")
    chosen = parser.parse_args(argv)
    sizes = QUICK if chosen.quick else FULL
    with workers_of(start, "growth", sizes, chosen.against, chosen.threads) as workers:
        samples = interleave(workers, chosen.rounds)
    results = results_of(samples, cases_of(sizes))
    show(results, f"median over {chosen.rounds} rounds (smallest-largest)")
    print("written to", write_record("scaling_quick" if chosen.quick else "scaling", chosen, workers, results, samples))
    return results


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        raise SystemExit(str(error)) from error
