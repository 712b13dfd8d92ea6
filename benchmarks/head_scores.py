"""Heads of the embedded model by their scores, and what changes in the task of each kind without them.

    python benchmarks/head_scores.py [--heads 5] [--random 5] [--texts 8] [--length 32] [--seed 0] [--out FILE]

Induction, previous-token and duplicate-token heads by their patterns on random tokens said twice, successor heads by their OV maps. The
heads of the highest scores are ablated together by their means, and so are as many random heads, some times; means are taken over other
texts of the same kind. Tasks: the log-probability of the second half of other random tokens said twice; and for successor heads that of the
next word of ordinal sequences ("Monday Tuesday Wednesday Thursday" + " Friday").
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import steer
from steer.circuits import Head, HeadScores, head_effects, head_scores, repeated_tokens, successor_scores
from steer.circuits.heads.ordinals import ORDINALS
from steer.files import atomic_write
from steer.model.tokens import Row

SHOWN = 4  # words of an ordinal sequence before the one that is asked for


def second_half(rows: list[Row], length: int) -> Any:
    """Target: mean log-probability of the tokens said again, from the second of them on."""

    def target(logits: Tensor, prompt: int) -> Tensor:
        ids = torch.tensor(rows[prompt].ids)
        return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[-(length - 1) :].mean()

    return target


def ordinal_prompts(tokenizer: Any) -> tuple[list[Row], list[int]]:
    """Sequences of words of each task, and the token that begins the next word."""
    rows, following = [], []
    for of_task in ORDINALS.values():
        for start in range(len(of_task) - SHOWN):
            ids = tokenizer(" ".join(of_task[start : start + SHOWN])).input_ids
            whole = tokenizer(" ".join(of_task[start : start + SHOWN + 1])).input_ids
            if whole[: len(ids)] == ids:
                # a digit comes behind a token of its own for the space
                tail = whole[len(ids) :]
                rows.append(Row((*ids, *tail[:-1]), 0))
                following.append(tail[-1])
    return rows, following


def ablated(
    model: Any, scores: HeadScores, kind: str, texts: list[Row], means: list[Row], target: Any, given: argparse.Namespace
) -> dict[str, Any]:
    """Change of a target without the top heads together, without the best alone, and without random ones."""
    top = [head for head, _ in scores.top(kind, given.heads)]
    layers, heads = scores[kind].shape
    others = [Head(layer, head) for layer in range(layers) for head in range(heads) if Head(layer, head) not in top]
    choose = random.Random(given.seed)
    groups = [choose.sample(others, given.heads) for _ in range(given.random)]
    effects = head_effects(model, [top[0], top, *groups], texts, target, ablations=["mean"], means_from=means)
    changes = effects.changes["mean"]
    by_random = changes[2:].mean(1)
    return {
        "top": [[str(head), round(score, 4)] for head, score in scores.top(kind, given.heads)],
        "clean": float(effects.clean.mean()),
        "change_without_the_first": float(changes[0].mean()),
        "change_without_all": float(changes[1].mean()),
        "standard_error": float(changes[1].std() / len(texts) ** 0.5),
        "change_without_random": [float(change) for change in by_random],
        "random_heads": [[str(head) for head in group] for group in groups],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = steer.load("smollm2-135m")
    start = time.process_time()
    scored, texts, means = (repeated_tokens(model, given.texts, given.length, seed=given.seed + i) for i in range(3))
    scores = head_scores(model, texts=scored)
    pattern_seconds = time.process_time() - start
    results = {kind: ablated(model, scores, kind, texts, means, second_half(texts, given.length), given) for kind in scores.scores}
    successors = successor_scores(model)
    prompts, following = ordinal_prompts(tokenizer)
    judged = steer.LogProbability(following[::2])
    results["successor"] = ablated(model, successors, "successor", prompts[::2], prompts[1::2], judged, given)
    results["successor"]["chance"] = successors.facts["chance"]
    table = Table("kind", "top heads", "task", "without the first", "without all", "without random")
    for kind, result in results.items():
        heads = " ".join(f"{head} ({score:.2f})" for head, score in result["top"])
        by_random = " ".join(f"{change:+.2f}" for change in result["change_without_random"])
        table.add_row(kind, heads, f"{result['clean']:.2f}", f"{result['change_without_the_first']:+.2f}",
                      f"{result['change_without_all']:+.2f}", by_random)  # fmt: skip
    Console().print(table)
    facts = {"texts": given.texts, "length": given.length, "seed": given.seed, "ordinal_prompts": len(following[::2])}
    seconds = {"patterns": round(pattern_seconds, 1), "all": round(time.process_time() - start, 1)}
    if given.out is not None:
        made = {"settings": facts, "version": steer.__version__, "cpu_seconds": seconds, "kinds": results}
        atomic_write(given.out, json.dumps(made, indent=1).encode())


if __name__ == "__main__":
    main()
