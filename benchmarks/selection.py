"""What choosing a direction costs, in plain forward passes over the same texts: this checkout beside another one.

    python benchmarks/selection.py                                # this checkout
    git worktree add --detach ../before 326ad19
    python benchmarks/selection.py --against ../before            # and an older commit, in the same rounds

`select` has 16 candidates at 16 sites, `calibrate` 9 row slots at the middle layer, `extract` 64 pairs. The unit is the CPU time of one
plain pass over all texts of the work, each once, taken just before; memory is the most that the process held, weights included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from checkouts import BEFORE, NOW, Samples, Start, Worker, WorkerError, common_arguments, interleave, summary, workers_of, write_record
from rich.console import Console
from rich.table import Table

FULL: dict[str, Any] = {"candidates": 16, "prompts": 20, "judged": 16, "neutral": 8, "pairs": 64}
QUICK: dict[str, Any] = {"candidates": 2, "prompts": 4, "judged": 4, "neutral": 2, "pairs": 8}
GOALS = {"select": 14, "calibrate, short answers": 3}  # plain passes
LEAST = 1e-3  # smaller numbers are compared as if they were of this size


def results_of(samples: Samples) -> dict[str, Any]:
    """Per case the goal, the summaries of `before` and `now`, their ratio, and how far their numbers are apart."""
    results: dict[str, Any] = {}
    for case, taken in samples[NOW].items():
        results[case] = {"goal": GOALS.get(case)}
        for label in (BEFORE, NOW):
            if label in samples:
                rounds = samples[label][case]
                results[case][label] = {
                    name: summary([sample[name] for sample in rounds]) for name in ("seconds", "passes", "peak", "added")
                }
        if BEFORE in samples:
            old = samples[BEFORE][case]
            results[case]["ratio"] = summary([a["seconds"] / b["seconds"] for a, b in zip(taken, old, strict=True)])
            results[case]["apart"] = apart(taken[0], old[0])
    return results


def apart(now: dict[str, Any], before: dict[str, Any]) -> float:
    """Largest difference of two samples' numbers, as a share of their size."""
    return max(abs(a - b) / max(abs(b), LEAST) for a, b in zip(now["numbers"], before["numbers"], strict=True))


def show(results: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    for name in ("what", "passes before", "passes now", "goal", "MiB before", "MiB now", "now / before", "numbers apart"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for case, row in results.items():
        table.add_row(
            case,
            *(figure(row.get(label), "passes", 2) for label in (BEFORE, NOW)),
            "" if row["goal"] is None else str(row["goal"]),
            *(figure(row.get(label), "peak", 0) for label in (BEFORE, NOW)),
            f"{row['ratio']['median']:.3f}" if "ratio" in row else "",
            f"{row['apart']:.0e}" if "apart" in row else "",
        )
    Console(width=140).print(table)


def figure(numbers: dict[str, Any] | None, name: str, digits: int) -> str:
    """The median of one of the numbers of a case."""
    return "" if numbers is None else f"{numbers[name]['median']:,.{digits}f}"


def main(argv: Sequence[str] | None = None, start: Start = Worker) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, rounds=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="small sizes, for which the goals say nothing")
    chosen = parser.parse_args(argv)
    sizes = QUICK if chosen.quick else FULL
    with workers_of(start, "choosing", {"model": chosen.model, **sizes}, chosen.against, chosen.threads) as workers:
        samples = interleave(workers, chosen.rounds)
    results = results_of(samples)
    show(results, f"{chosen.model}, {chosen.threads} thread(s), median over {chosen.rounds} rounds")
    print("written to", write_record("selection_quick" if chosen.quick else "selection", chosen, workers, results, samples))
    return results


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        raise SystemExit(str(error)) from error
