"""Edge attribution of steer beside hannamw/EAP-IG on the embedded SmolLM2-135M: CPU time in forward passes, memory, and the scores.

    OMP_NUM_THREADS=1 python benchmarks/edge_attribution.py [--eap-ig PYTHON CHECKOUT] [--rounds 5] [--pairs 16] [--batch 8] [--steps 5]

PYTHON is an interpreter with transformer-lens 2 and what EAP-IG needs, CHECKOUT a clone of the repository with 'cuda' replaced by
model.cfg.device. Every arm is a process of its own that keeps the model; they take turns, one round after another, on one thread, and
`steer again` is steer a second time: what separates it from `steer` is noise. Prompts are indirect-object sentences. EAP-IG copies keys and
values for every query head; its scores of the copies add up to those of a key-value group.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_arm import Arm

import steer
from steer.circuits import ComponentScores
from steer.circuits.key_value_groups import grouped
from steer.circuits.mib import read_mib

HERE = Path(__file__).resolve().parent
NAMES = ("John", "Mary", "Tom", "Anna", "James", "Sarah", "Paul", "Laura")
TEMPLATES = ("Then, {a} and {b} went to the store. {s} gave a book to", "When {a} and {b} got to the park, {s} handed the ball to")


def write_task(folder: Path, count: int, batch: int, steps: int) -> None:
    """The model, its tokenizer and the pairs."""
    model, tokenizer = steer.load("smollm2-135m")
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chooser = random.Random(0)
    task: dict[str, Any] = {"clean": [], "corrupted": [], "right": [], "wrong": [], "batch": batch, "steps": steps}
    for number in range(count):
        a, b = chooser.sample(NAMES, 2)
        template = TEMPLATES[number % len(TEMPLATES)]
        task["clean"].append(template.format(a=a, b=b, s=b))
        task["corrupted"].append(template.format(a=a, b=b, s=a))
        task["right"].append(tokenizer(f" {a}").input_ids[0])
        task["wrong"].append(tokenizer(f" {b}").input_ids[0])
    (folder / "pairs.json").write_text(json.dumps(task))


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    forwards = [run["seconds"] / run["forward_seconds"] for run in runs]
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "forward_passes": statistics.median(forwards),
        "forward_passes_range": [min(forwards), max(forwards)],
    }


def agreement(folder: Path, method: str) -> dict[str, float]:
    """Largest difference of the scores, in parts of the largest score, and their correlation."""
    ours = ComponentScores.load(folder / f"steer_{method}")
    theirs = read_mib(folder / f"{method}.pt")
    shapes = ours.graph.layers
    scores = -grouped(theirs.scores, shapes[0].heads, [shape.groups for shape in shapes]).double()  # theirs: corrupted less clean
    own = ours.edge_scores
    possible = ours.graph.possible
    pair = torch.stack([own[possible], scores[possible]])
    return {
        "largest_difference": float((pair[0] - pair[1]).abs().max() / pair[0].abs().max()),
        "correlation": float(torch.corrcoef(pair)[0, 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eap-ig", nargs=2, metavar=("PYTHON", "CHECKOUT"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(folder, options.pairs, options.batch, options.steps)
        peers = HERE / "circuit_peers"
        arms = [Arm(name, [sys.executable, peers / "steer_edges.py", folder]) for name in ("steer", "steer again")]
        if options.eap_ig:
            python, checkout = options.eap_ig
            arms.append(Arm("EAP-IG", [python, peers / "eap_ig.py", folder, checkout]))
        runs: dict[str, dict[str, list[dict[str, float]]]] = {arm.name: {"eap": [], "eap_ig": []} for arm in arms}
        first: dict[str, dict[str, float]] = {arm.name: {} for arm in arms}
        # the first round warms up; memory is read in it, since later the process holds what it once had
        for number in range(options.rounds + 1):
            for method in ("eap", "eap_ig"):
                for arm in arms:
                    found = arm.run(method)
                    if number:
                        runs[arm.name][method].append(found)
                    else:
                        first[arm.name][method] = found["bytes"] / 2**20
                    print(number, method, arm.name, {key: round(value, 2) for key, value in found.items()}, file=sys.stderr, flush=True)
        result: dict[str, Any] = {
            "threads": 1, "rounds": options.rounds, "pairs": options.pairs, "batch": options.batch, "steps": options.steps,
            "torch": torch.__version__,
            "arms": {
                name: {method: {**summary(found), "MiB": first[name][method]} for method, found in of.items()}
                for name, of in runs.items()
            },
        }  # fmt: skip
        if options.eap_ig:
            result["agreement"] = {method: agreement(folder, method) for method in ("eap", "eap_ig")}
        print(json.dumps(result, indent=1))
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
