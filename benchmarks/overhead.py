"""What steering costs beside the bare model: prefill, decode and a training step, one site and all sites, in one interleaved run.

    python benchmarks/overhead.py [--model smollm2-135m] [--rounds 9] [--threads 1] [--out overhead.json]

Every round runs every arm once, in the opposite order of the round before, and each figure is the median over rounds of the ratio to the
bare model of the same round, with the smallest and the largest. CPU seconds of the process are compared, which other programs on the
machine disturb less than wall time; on a GPU it is wall time after a synchronisation. The arm `bare again` shows the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from steer.commands.info import versions
from steer.directions import Direction
from steer.drift.tracker import DriftTracker
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.load import load

Work = Callable[[], None]
Arm = Callable[[], AbstractContextManager[Any]]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def arms(model: torch.nn.Module, scope: str, tracked: bool) -> dict[str, Arm]:
    """Context makers: bare twice, one site, all sites, an ablation at all sites; for training also what the two callbacks install."""
    anatomy = Anatomy.find(model)
    vector = torch.randn(anatomy.width, generator=torch.Generator().manual_seed(0)) * 0.1

    def plan(operator: Any, layers: list[int]) -> Arm:
        made = Plan([Intervention(operator(vector), f"layers.{layer}.output", scope=scope) for layer in layers])
        return lambda: made.attached(model)

    every, middle = list(range(anatomy.n_layers)), anatomy.n_layers // 2
    made: dict[str, Arm] = {
        "bare": nullcontext,
        "bare again": nullcontext,
        "add, 1 site": plan(Add, [middle]),
        f"add, {len(every)} sites": plan(Add, every),
        f"ablate, {len(every)} sites": plan(Ablate, every),
    }
    if tracked:
        sites = [
            anatomy.point(f"layers.{layer}.output").site for layer in (middle // 2, middle, middle + middle // 2, anatomy.n_layers - 1)
        ]
        directions = {"random": [Direction(site, vector, "none", "response") for site in sites]}

        @contextmanager
        def callbacks() -> Iterator[None]:
            with plan(Add, [middle])(), DriftTracker(directions, stream=True).attached(model):
                yield

        made["callbacks: add, 1 site; stream of 17 directions at 4 sites"] = callbacks
    return made


def interleave(device: torch.device, chosen: dict[str, Arm], work: Work, rounds: int) -> dict[str, list[float]]:
    """Ratios to the bare arm of the same round, one list an arm."""
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    work()
    for number in range(rounds):
        taken = {}
        for name in list(chosen)[:: 1 if number % 2 else -1]:
            with chosen[name]():
                started = clock(device)
                work()
                taken[name] = clock(device) - started
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken["bare"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=16, help="decoded tokens")
    parser.add_argument("--out", help="write the ratios to this JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, tokenizer = load(chosen.model, device=chosen.device)
    ids = torch.randint(5, model.config.vocab_size, (1, chosen.prompt), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    batch = ids.view(4, -1)

    @torch.no_grad()
    def prefill() -> None:
        model(ids, use_cache=True)

    def decode() -> None:
        start = ids[:, :16]
        model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=chosen.new, min_new_tokens=chosen.new, do_sample=False)

    def train() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    results = {}
    for name, work, scope in (("prefill", prefill, "all"), ("decode", decode, "response"), ("training step", train, "response")):
        model.train(name == "training step")
        results[name] = interleave(ids.device, arms(model, scope, name == "training step"), work, chosen.rounds)
    title = f"{chosen.model} on {chosen.device}, {chosen.threads} thread(s), {chosen.rounds} rounds: ratio to the bare model"
    table = Table("arm", *results, title=title)
    for arm in results["training step"]:
        row = [results[name].get(arm) for name in results]
        table.add_row(arm, *("" if r is None else f"{statistics.median(r):.3f} [{min(r):.3f}-{max(r):.3f}]" for r in row))
    Console(width=140).print(table)
    if chosen.out:
        with open(chosen.out, "w") as file:
            json.dump(
                {
                    "machine": platform.processor() or platform.machine(),
                    "versions": versions(),
                    "arguments": vars(chosen),
                    "ratios": results,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
