"""Edits per CPU second of steer beside EasyEdit's ROME, on the embedded SmolLM2-135M: the same facts, layer, steps and contexts.

    OMP_NUM_THREADS=1 python benchmarks/editing.py [--easyedit PYTHON CHECKOUT] [--facts 4] [--rounds 2] [--steps 20] [--layer 8]

PYTHON is an interpreter with what EasyEdit's ROME imports (torch, transformers, datasets, matplotlib, PyYAML), CHECKOUT a clone of
zjunlp/EasyEdit. Every arm is a process of its own that keeps the model; they take turns, one round after another, on one thread. `steer`
edits one fact a call; `steer batched` optimises the values of all facts together and then makes an edit of each. Contexts are those that
steer draws, 20 and the plain prompt (EasyEdit's own number) and 5 and the plain prompt; drawing them is not timed, nor is the covariance,
which steer uses and EasyEdit as it ships does not. The first round warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_arm import Arm

import steer
from steer.edits import Covariance, Fact, sample_contexts
from steer.edits.running_text import shipped_texts

HERE = Path(__file__).resolve().parent
FACTS = (
    ("{} is located in the country of", "Darmstadt", "Argentina"),
    ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ("The official language of {} is", "Italy", "Korean"),
    ("The headquarters of {} is in", "Irish Ferries", "Rome"),
    ("The official religion of {} is", "As-Saffah", "Judaism"),
    ("{} was created by", "The Apple A5", "Google"),
    ("The capital of {} is", "France", "Madrid"),
    ("The native language of {} is", "Anatole France", "English"),
)
NUMBERS = (21, 6)  # of texts for each prompt, the plain one included


def write_task(folder: Path, facts: int, layer: int, steps: int) -> None:
    """The model, its tokenizer, the covariance of the layer, the facts and the contexts."""
    model, tokenizer = steer.load("smollm2-135m")
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = [Fact.of(*fact) for fact in FACTS[:facts]]
    targets = [fact.target for fact in chosen]
    Covariance.fit(model, tokenizer, shipped_texts(), [layer]).save(folder / "covariance")
    task: dict[str, Any] = {
        "facts": [{"prompt": prompt, "subject": subject, "target": target} for prompt, subject, target in FACTS[:facts]],
        "layer": layer,
        "last_layer": model.config.num_hidden_layers - 1,
        "steps": steps,
        "contexts": {str(n): list(sample_contexts(model, tokenizer, count=n - 1, seed=0, avoid=targets).prefixes) for n in NUMBERS},
    }
    (folder / "task.json").write_text(json.dumps(task))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] / run["edits"] for run in runs]
    return {
        "seconds_per_edit": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "edits_per_cpu_second": 1 / statistics.median(seconds),
        "steps": runs[-1]["steps"],
        "probabilities": runs[-1]["probabilities"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easyedit", nargs=2, metavar=("PYTHON", "CHECKOUT"))
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(folder, options.facts, options.layer, options.steps)
        peers = HERE / "edit_peers"
        arms = [Arm(f"steer{' batched' * batched}", [sys.executable, peers / "steer_edits.py", folder, batched]) for batched in (0, 1)]
        if options.easyedit:
            python, checkout = options.easyedit
            arms.append(Arm("EasyEdit", [python, peers / "easyedit.py", folder, checkout]))
        runs: dict[str, dict[int, list[dict[str, Any]]]] = {arm.name: {n: [] for n in NUMBERS} for arm in arms}
        for number in range(options.rounds + 1):
            for contexts in NUMBERS:
                for arm in arms:
                    if number == 0 and arm.name == "EasyEdit" and contexts != NUMBERS[-1]:
                        continue  # minutes, to warm up
                    found = arm.run(contexts)
                    if number:
                        runs[arm.name][contexts].append(found)
                    print(number, contexts, arm.name, json.dumps(found), file=sys.stderr, flush=True)
    arms_found = {name: {str(n): summary(found) for n, found in of.items()} for name, of in runs.items()}
    result: dict[str, Any] = {
        "threads": 1, "rounds": options.rounds, "facts": options.facts, "steps": options.steps, "layer": options.layer,
        "torch": torch.__version__, "version": steer.__version__, "arms": arms_found,
    }  # fmt: skip
    if options.easyedit:
        theirs = {n: arms_found["EasyEdit"][str(n)]["seconds_per_edit"] for n in NUMBERS}
        result["times_as_fast"] = {
            name: {
                **{f"{n} contexts": theirs[n] / of[str(n)]["seconds_per_edit"] for n in NUMBERS},
                "6 against their 21": theirs[21] / of["6"]["seconds_per_edit"],
            }
            for name, of in arms_found.items()
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
