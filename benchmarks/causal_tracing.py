"""Causal tracing by fast passes beside the plain protocol, one whole pass for each cell: CPU seconds on the mix of templates of a data set.

    python benchmarks/causal_tracing.py --facts FILE [--first 3] [--later 1] [--plain 4] [--samples 10] [--kinds hidden mlp attn]
        [--out FILE]

`FILE` holds CounterFact, zsRE or known_1000. Facts that the model knows are taken from its beginning: so many whose subject comes first,
and so many with tokens before it. At every token the fast passes run, then some cells by the plain protocol, then the fast passes again, so
that what one and the same way differs by is known. All cells of the plain protocol are passes of one size: the mean of those that ran
stands for the others, also for those before the subject, which the fast passes need not run. What both ways need once for a fact (the clean
and the corrupted runs) counts for both; the trial by which the fast passes are proven on a model counts for neither and is reported. One
thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import steer
from steer.edits.records import load_records
from steer.edits.tracing import KINDS
from steer.edits.tracing.cells import Cell, Restoring
from steer.edits.tracing.corruptions.noise import Noise
from steer.edits.tracing.fast import FastPasses
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.plain import plain_logits
from steer.edits.tracing.prompts import Subjects, TracedPrompt, traced_prompts
from steer.edits.tracing.trial import record_for_fast
from steer.files import atomic_write
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating

GOAL = 5.0  # times the plain protocol, on the mix of the data set
FIRST, LATER = "subject first", "subject later"
MAX_TOKENS = 2048


@dataclass
class Measured:
    """CPU seconds of one fact.

    Attributes:
        once: the clean and the corrupted runs. fast, again: of all cells, twice. plain: of each whole pass that ran.
        apart: the largest difference of any probability between both ways.
    """

    prompt: TracedPrompt
    cells: int
    once: float = 0.0
    fast: float = 0.0
    again: float = 0.0
    plain: list[float] = field(default_factory=list)
    apart: float = 0.0

    @property
    def group(self) -> str:
        return LATER if self.prompt.first else FIRST

    @property
    def fast_seconds(self) -> float:
        """Of the whole fact, the mean of both measurements."""
        return self.once + (self.fast + self.again) / 2

    @property
    def plain_seconds(self) -> float:
        return self.once + statistics.mean(self.plain) * self.cells

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt.fact.prompt,
            "subject": self.prompt.fact.subject,
            "tokens": len(self.prompt.ids),
            "before_the_subject": self.prompt.first,
            "cells": self.cells,
            "plain_cells_run": len(self.plain),
            "seconds": {"once": self.once, "fast": self.fast, "fast again": self.again, "plain": self.plain},
            "faster": self.plain_seconds / self.fast_seconds,
            "a_a": self.again / self.fast,
            "probability_apart": self.apart,
        }


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    found = action()
    return time.process_time() - begin, found


def fast_logits(passes: Passes, prompt: TracedPrompt, restoring: Restoring, record: Record, token: int) -> dict[Cell, Tensor]:
    """[samples, vocabulary] of every cell at a token that the fast passes run."""
    cells = [cell for cell in restoring.cells(token, passes.anatomy.n_layers) if cell.joins < passes.anatomy.n_layers]
    batches = FastPasses(passes, prompt, restoring.severed, record, max_tokens=MAX_TOKENS).logits(cells)
    return {cell: of_cell for batch, logits in batches for cell, of_cell in zip(batch, logits, strict=True)}


def measure(
    passes: Passes, restoring: Restoring, subjects: Subjects, number: int, plain_cells: int, samples: int, generator: torch.Generator
) -> Measured:
    """One fact. plain_cells: whole passes at each token."""
    prompt, n_layers = subjects.prompts[number], passes.anatomy.n_layers
    corrupted = Noise().of(number, subjects, samples, generator).embeddings
    measured = Measured(prompt, len(prompt.ids) * len(restoring.cells(0, n_layers)))
    measured.once, record = timed(lambda: record_for_fast(passes, prompt, corrupted, restoring, MAX_TOKENS))
    assert record is not None, "this model does not take the fast passes"
    for token in range(prompt.first, len(prompt.ids)):
        seconds, fast = timed(lambda token=token: fast_logits(passes, prompt, restoring, record, token))
        measured.fast += seconds
        run = list(fast)
        for place in torch.randperm(len(run), generator=generator)[:plain_cells].tolist():
            cell = run[place]
            seconds, plain = timed(lambda cell=cell: plain_logits(passes, prompt, corrupted, cell, None, record))
            measured.plain.append(seconds)
            apart = (plain.softmax(-1).mean(0) - fast[cell].softmax(-1).mean(0)).abs().max()
            measured.apart = max(measured.apart, float(apart))
        measured.again += timed(lambda token=token: fast_logits(passes, prompt, restoring, record, token))[0]
    return measured


def chosen(passes: Passes, prompts: Sequence[TracedPrompt], wanted: dict[str, int]) -> list[int]:
    """Numbers of the first facts of each group that the model knows."""
    left, found = dict(wanted), []
    for number, prompt in enumerate(prompts):
        group = LATER if prompt.first else FIRST
        if left[group] and int(passes.clean_logits(prompt).argmax()) == prompt.answer[0]:
            left[group] -= 1
            found.append(number)
        if not any(left.values()):
            break
    return found


def run(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    anatomy, restoring = Anatomy.find(model), Restoring.of(given.kinds, 10, None)
    prompts = traced_prompts(tokenizer, [record.fact for record in load_records(given.facts)], anatomy)
    passes, subjects = Passes(model, anatomy, restoring.sites(anatomy)), Subjects(model, anatomy, tokenizer, prompts)
    generator = torch.Generator().manual_seed(given.seed)
    with evaluating(model):
        numbers = chosen(passes, prompts, {FIRST: given.first, LATER: given.later})
        shortest = min(numbers, key=lambda number: len(prompts[number].ids))
        corrupted = Noise().of(shortest, subjects, given.samples, generator).embeddings
        passes.record(prompts[shortest], corrupted, with_cache=True)  # warm
        trial, _ = timed(lambda: record_for_fast(passes, prompts[shortest], corrupted, restoring, MAX_TOKENS))
        facts = [measure(passes, restoring, subjects, number, given.plain, given.samples, generator) for number in numbers]
    share = sum(prompt.first == 0 for prompt in prompts) / len(prompts)
    means = {
        group: [statistics.mean(getattr(each, name) for each in facts if each.group == group) for name in ("plain_seconds", "fast_seconds")]
        for group in dict.fromkeys(each.group for each in facts)
    }
    faster = {group: plain / fast for group, (plain, fast) in means.items()}
    # the plain protocol takes as long for both kinds of prompt of one length, whatever the lengths of the few that ran
    mix = 1 / (share / faster[FIRST] + (1 - share) / faster[LATER]) if len(faster) == 2 else None
    return {
        "setting": {
            "model": given.model,
            "kinds": list(restoring.kinds),
            "window": restoring.window,
            "samples": given.samples,
            "seed": given.seed,
            "facts_in_file": len(prompts),
            "threads": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__, "steer": steer.__version__},
        "facts": [each.as_json() for each in facts],
        "share_subject_first": share,
        "seconds_a_fact": {group: {"plain": pair[0], "fast": pair[1]} for group, pair in means.items()},
        "faster": {**faster, "mix": mix},
        "goal": GOAL,
        "a_a": sum(each.again for each in facts) / sum(each.fast for each in facts),
        "probability_apart": max(each.apart for each in facts),
        "trial_seconds": trial,
    }


def show(result: dict[str, Any]) -> None:
    table = Table("", "plain, s a fact", "fast, s a fact", "times as fast")
    for group, seconds in result["seconds_a_fact"].items():
        table.add_row(group, f"{seconds['plain']:.1f}", f"{seconds['fast']:.1f}", f"{result['faster'][group]:.2f}")
    if result["faster"]["mix"] is not None:
        name = f"mix of the file, {result['share_subject_first']:.0%} with the subject first"
        table.add_row(name, "", "", f"{result['faster']['mix']:.2f} (goal {result['goal']:g})")
    console = Console()
    console.print(table)
    apart, trial = result["probability_apart"], result["trial_seconds"]
    console.print(f"fast again / fast {result['a_a']:.3f}; probabilities apart by {apart:.1e}; trial {trial:.1f} s")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=3, help="facts whose subject comes first")
    parser.add_argument("--later", type=int, default=1, help="facts with tokens before the subject")
    parser.add_argument("--plain", type=int, default=4, help="whole passes at each token")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = run(*steer.load(given.model), given)
    show(result)
    if given.out is not None:
        atomic_write(given.out, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
