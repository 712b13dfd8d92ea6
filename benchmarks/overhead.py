"""What a hook costs in a decode step: by hand, by steer, and by steer of another checkout, timed where the hooks run.

    python benchmarks/overhead.py                                         # this checkout beside hooks written by hand
    git worktree add --detach ../before 326ad19
    python benchmarks/overhead.py --against ../before                     # and beside an older commit, in the same rounds
    python benchmarks/overhead.py --environments ~/peers                  # and beside steering-vectors and repsteer
    python benchmarks/overhead.py --model tiny --rounds 1 --steps 8       # a look, in seconds

Every layer's output is edited. A figure is the time inside hooks in a decode step, that of the modules around the decoder included, without
what an empty hook takes, divided by the number of layers: microseconds per site and token. Each call of a hook is timed, its median taken
over the steps, and the medians added up; the figure is the median over the rounds. This resolves what the ratio of two whole steps does
not: the arm by hand is measured twice (`A/A`), and differs by far less than 0.3 % of a step.

Between two blocks the weights have gone through the caches, so a hook costs several times what it does in a loop of its own.

`--environments` takes the folder of virtual environments that benchmarks/steering.py makes. What training costs on top of the bare step is
part of every report of `steer train` (`callback_overhead`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from checkouts import (
    BEFORE,
    NOW,
    MeasuresCases,
    Samples,
    Start,
    Worker,
    WorkerError,
    common_arguments,
    interleave,
    summary,
    workers_of,
    write_record,
)
from rich.console import Console
from rich.table import Table

# edit -> (what it is, goal in microseconds per site and token)
EDITS: dict[str, tuple[str, float | None]] = {
    "add": ("add a vector", 10),
    "ablate": ("ablate a direction", 40),
    "clamp": ("clamp a projection", 60),
    "gate": ("add behind a probe gate", 90),
    "norm kept": ("add, norm preserved", 60),
    "rows": ("add, 8 rows with vectors of their own", 12),
    "window": ("add in a window, generated[:n]", None),
}
PEERS = ("steering-vectors", "repsteer")
RESOLUTION = 0.3  # percent of a step


def net_costs(samples: dict[str, list[dict[str, float]]], case: str) -> list[float]:
    """Microseconds per site and token in each round, without what an empty hook takes in the same round."""
    pairs = zip(samples[case], samples["timer"], strict=True)
    return [(cost["hooks_us"] - cost["calls"] * empty["hooks_us"] / empty["calls"]) / cost["sites"] for cost, empty in pairs]


def shares(samples: dict[str, list[dict[str, float]]], case: str) -> list[float]:
    """Time that an edit adds to a step in each round, in percent."""
    costs = zip(net_costs(samples, case), samples[case], strict=True)
    return [100 * net * sample["sites"] / sample["rest_us"] for net, sample in costs]


def repeat_differences(samples: dict[str, list[dict[str, float]]]) -> list[float]:
    """Difference between two timings of the same hook in each round, in percent of a step."""
    first, second = shares(samples, "hand: add"), shares(samples, "hand again: add")
    return [again - once for once, again in zip(first, second, strict=True)]


def results_of(samples: Samples, *, has_goals: bool) -> dict[str, Any]:
    """Summaries of each edit by hand (on all workers), before and now, with their shares of a step; of peers, the empty hook and A/A."""
    own = {label: samples[label] for label in (BEFORE, NOW) if label in samples}
    edits: dict[str, Any] = {}
    for edit, (_, goal) in EDITS.items():
        row: dict[str, Any] = {"goal": goal if has_goals else None}
        by_hand = [cost for cases in own.values() if f"hand: {edit}" in cases for cost in net_costs(cases, f"hand: {edit}")]
        if by_hand:
            row["hand"] = summary(by_hand)
            row["hand % of step"] = summary([share for cases in own.values() for share in shares(cases, f"hand: {edit}")])
        for label, cases in own.items():
            row[label] = summary(net_costs(cases, f"steer: {edit}"))
            row[f"{label} % of step"] = summary(shares(cases, f"steer: {edit}"))
        edits[edit] = row
    peers = {label: summary(net_costs(cases, f"{label}: add")) for label, cases in samples.items() if label not in own}
    peer_shares = {label: summary(shares(samples[label], f"{label}: add")) for label in peers}
    empty = [sample["hooks_us"] / sample["calls"] for cases in own.values() for sample in cases["timer"]]
    repeated = summary([difference for cases in own.values() for difference in repeat_differences(cases)])
    return {
        "edits": edits,
        "peers": peers,
        "peers % of step": peer_shares,
        "empty hook us": summary(empty),
        "A/A % of step": repeated,
        "resolves": max(abs(repeated["min"]), abs(repeated["max"])) <= RESOLUTION,
        "step ms": summary([sample["rest_us"] / 1e3 for sample in own[NOW]["timer"]]),
        "sites": own[NOW]["timer"][0]["sites"],
    }


def start_peers(start: Start, environments: Path | None, arguments: dict[str, Any], threads: int, stack: ExitStack) -> list[MeasuresCases]:
    """The workers of other libraries whose environments are there; says which are not."""
    workers: list[MeasuresCases] = []
    for peer in PEERS if environments is not None else ():
        assert environments is not None
        python = environments.expanduser().resolve() / peer / ("Scripts" if os.name == "nt" else "bin") / "python"
        try:
            if not python.is_file():
                raise WorkerError(f"{python} is not there; benchmarks/steering.py makes it")
            worker = start(peer, "hook_cost", {**arguments, "peer": peer}, None, threads=threads, python=python)
        except WorkerError as error:
            Console(stderr=True).print(f"{peer} is not measured: {error}")
            continue
        stack.callback(getattr(worker, "stop", lambda: None))
        workers.append(worker)
    return workers


def show(results: dict[str, Any], title: str) -> None:
    console = Console(width=150)
    table = Table(title=title)
    for name in ("edit", "by hand", "before", "now", "goal", "now / hand", "before, % of a step", "now, % of a step"):
        table.add_column(name, justify="left" if name == "edit" else "right")
    for edit, row in results["edits"].items():
        table.add_row(EDITS[edit][0], *(entry or "" for entry in cells(row)))
    for peer, figures in results["peers"].items():
        share = results["peers % of step"][peer]
        table.add_row(f"add a vector, {peer}", "", "", microseconds(figures), "", "", "", percent(share))
    console.print(table)
    repeated = results["A/A % of step"]
    verdict = "resolves" if results["resolves"] else "DOES NOT RESOLVE"
    console.print(
        f"A/A: {repeated['median']:+.3f} % of a step, 95 % interval {repeated['low']:+.3f} to {repeated['high']:+.3f}, "
        f"rounds {repeated['min']:+.3f} to {repeated['max']:+.3f}: {verdict} {RESOLUTION} %"
    )
    empty, step = results["empty hook us"]["median"], results["step ms"]["median"]
    console.print(f"taken off: {empty:.2f} us for each call of a hook, what an empty one takes; a step has {step:.1f} ms")


def cells(row: dict[str, Any]) -> list[str]:
    """One edit's entries of the table: by hand, before, now, goal, now / hand, and the shares of a step."""
    figures = [microseconds(row.get(name)) for name in ("hand", BEFORE, NOW)]
    goal = "" if row["goal"] is None else f"{row['goal']:g} {'reached' if row[NOW]['median'] <= row['goal'] else 'missed'}"
    times = f"{row[NOW]['median'] / row['hand']['median']:.1f}x" if "hand" in row else ""
    return [*figures, goal, times, percent(row.get(f"{BEFORE} % of step")), percent(row[f"{NOW} % of step"])]


def microseconds(figures: dict[str, float] | None) -> str:
    return "" if figures is None else f"{figures['median']:.1f} ({figures['min']:.1f}-{figures['max']:.1f})"


def percent(figures: dict[str, float] | None) -> str:
    return "" if figures is None else f"{figures['median']:.2f} ({figures['min']:.2f}-{figures['max']:.2f})"


def main(argv: Sequence[str] | None = None, start: Start = Worker) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, rounds=7)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, `tiny` or a folder with a Llama-like one")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of one measurement (default: %(default)s)")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="virtual environments of other libraries")
    chosen = parser.parse_args(argv)
    arguments = {"model": model_folder(chosen.model), "steps": chosen.steps}
    with workers_of(start, "hook_cost", arguments, chosen.against, chosen.threads) as workers, ExitStack() as stack:
        workers = [*workers, *start_peers(start, chosen.environments, arguments, chosen.threads, stack)]
        samples = interleave(workers, chosen.rounds)
    is_embedded = chosen.model == parser.get_default("model")
    results = results_of(samples, has_goals=is_embedded)
    show(results, f"us per site and token in a decode step of {chosen.model}, {results['sites']} sites: median (smallest-largest round)")
    name = "overhead" if is_embedded else f"overhead_{Path(chosen.model).name}"
    print("written to", write_record(name, chosen, workers, results, samples))
    return results


def model_folder(name: str) -> str:
    if name != "smollm2-135m":
        return name
    from steer.model import embedded

    return str(embedded.converted_folder())


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        raise SystemExit(str(error)) from error
