"""Methods that find or test circuits, on the embedded SmolLM2-135M and the tasks of circuit_tasks.py.

    OMP_NUM_THREADS=1 python benchmarks/circuit_methods.py curves|rules|acdc|scrubbing|das [--task ioi|greater_than] [--out FILE]

curves: CPR and CMD of MIB, edges by EAP and by EAP-IG (5 steps, found on 16 pairs), in the order of their size and of their value, beside
random orders, on 16 other pairs. rules: attribution methods and backward rules beside exact patching of 39 nodes. acdc: the 100 best edges
of EAP-IG thinned out by ACDC, beside as many edges of EAP-IG alone, on other pairs. scrubbing: causal scrubbing of hypotheses on which
heads depend on who is named where, other heads reading another prompt. das: the subspace that carries whether the first or the second name
is asked for, with its controls.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from checkouts import commit_of
from circuit_tasks import NAMES, PLACES, greater_than, ioi
from torch import nn

import steer
from steer.circuits import (
    Circuit,
    ComponentEvaluation,
    ComponentScores,
    LogitDifference,
    Pairs,
    acdc,
    attribute,
    causal_scrubbing,
    fit_das,
    interchange,
    patch_effects,
    resample_ablation,
)
from steer.circuits.attribution_methods.eap_ig import EAPIG
from steer.circuits.components import HEAD, MLP
from steer.commands.info import versions

HERE = Path(__file__).resolve().parent
TASKS = {"ioi": ioi, "greater_than": greater_than}
Measured = Callable[[nn.Module, Any, argparse.Namespace], dict[str, Any]]


# ---- CPR and CMD


def curves(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    make = TASKS[given.task]
    pairs, target = make(model, tokenizer, given.pairs, 0)
    others, other_target = make(model, tokenizer, given.pairs, 1)
    evaluation = ComponentEvaluation(model, others, other_target, resample_ablation())
    found: dict[str, Any] = {"methods": {}}
    for name, method in (("eap", "eap"), ("eap_ig", EAPIG(5))):
        scores = attribute(model, pairs, target, method=method)
        for absolute in (True, False):
            draws = given.draws if not found["methods"] else 0  # random orders do not depend on the scores
            curve = evaluation.curve(scores, absolute=absolute, draws=draws)
            found["methods"][f"{name}, by {'size' if absolute else 'value'}"] = {
                "cpr": curve.cpr,
                "cmd": curve.cmd,
                "faithfulness": dict(zip(curve.shares, curve.faithfulness.tolist(), strict=True)),
                "edges": curve.sizes,
            }
            if draws:
                found["random"] = {"cpr": curve.random_cpr.tolist(), "cmd": curve.random_cmd.tolist()}
                found["random"]["faithfulness"] = curve.random_faithfulness.tolist()
                found["full"], found["empty"] = float(curve.full.mean()), float(curve.empty.mean())
    return found


# ---- attribution beside exact patching


def rules(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    pairs, target = ioi(model, tokenizer, 8, 0)
    reference = attribute(model, pairs, target, method=EAPIG(5), edges=False, progress=False)
    writers = [writer.name for writer in reference.graph.writers if writer.kind in (HEAD, MLP) and writer.name != "m0"]
    best = sorted(writers, key=lambda name: -abs(reference[name]))[:19]
    drawn = random.Random(0).sample([name for name in writers if name not in best], 20)
    chosen = [*best, *drawn]
    exact = patch_effects(model, pairs, target, nodes=[*chosen, "m0"], progress=False)
    kinds = {"nodes": chosen, "heads": [n for n in chosen if n[0] == "a"], "mlps": [n for n in chosen if n[0] == "m"]}
    rows = []
    combinations = [
        ("eap", "plain"),
        ("eap", "gim"),
        ("eap", "relp"),
        ("clean_corrupted", "plain"),
        ("eap_ig", "plain"),
        ("eap_gp", "plain"),
    ]
    combinations += [("eap_ig", "gim"), ("eap_ig", "relp"), ("mask_gradient", "plain")]
    for method, rule in combinations:
        began = time.process_time()
        scores = attribute(model, pairs, target, method=method, rule=rule, edges=False, progress=False)
        row = {"method": method, "rule": rule, "cpu_seconds": time.process_time() - began, "m0": scores["m0"]}
        for kind, names in kinds.items():
            values = torch.tensor([[scores[name], exact[name]] for name in names], dtype=torch.float64)
            row[kind] = float(torch.corrcoef(values.T)[0, 1])
        rows.append(row)
    return {"exact_m0": exact["m0"], "counts": {kind: len(names) for kind, names in kinds.items()}, "rows": rows}


# ---- ACDC


def acdc_circuit(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    pairs, target = ioi(model, tokenizer, 4, 0)
    scores = attribute(model, pairs, target, method=EAPIG(5))
    candidates = scores.top_edges(given.candidates)
    others, other_target = ioi(model, tokenizer, given.pairs, 1)
    evaluation = ComponentEvaluation(model, others, other_target, resample_ablation())
    began = time.process_time()
    found = acdc(model, pairs, given.threshold, target, candidates=candidates)
    seconds = time.process_time() - began
    circuits = {"candidates": candidates, "acdc": found, "eap_ig, as many edges": _of_size(scores, _edges_in(found))}
    return {
        "threshold": given.threshold,
        "runs": found.facts["runs"],
        "acdc_cpu_seconds": seconds,
        "circuits": {name: _measured(evaluation, circuit) for name, circuit in circuits.items()},
        "shared_edges": int((found.edges & circuits["eap_ig, as many edges"].edges).sum()),
        "heads": sorted(name for name in found.node_names if name[0] == "a"),
    }


def _of_size(scores: ComponentScores, edges: int) -> Circuit:
    """The circuit of the highest edges that has as many after those that lead nowhere are dropped, or the next larger one."""
    low, high = edges, 4 * edges
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _edges_in(scores.top_edges(middle)) >= edges else (middle + 1, high)
    return scores.top_edges(low)


def _edges_in(circuit: Circuit) -> int:
    return 0 if circuit.edges is None else int(circuit.edges.sum())


def _measured(evaluation: ComponentEvaluation, circuit: Circuit) -> dict[str, Any]:
    found = evaluation.faithfulness(circuit, draws=1)
    size = {"edges": _edges_in(circuit), "nodes": len(circuit.node_names), "heads": sum(name[0] == "a" for name in circuit.node_names)}
    return {**size, "faithfulness": found.faithfulness, "random": found.random_faithfulness}


# ---- causal scrubbing


def scrubbing(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Heads depend on who is named where; the others write what they write on another prompt. MLPs run on."""
    pairs, target = ioi(model, tokenizer, 8, 0)
    scores = attribute(model, pairs, target, method=EAPIG(5), edges=False)
    chooser = random.Random(1)
    names = NAMES[:3]
    texts, keys, right, wrong = [], [], [], []
    for number in range(32):
        a, b = chooser.sample(names, 2)
        s, io = (b, a) if number % 2 else (a, b)
        texts.append(
            PLACES[0].format(a=a, b=b, s=s, p=chooser.choice(("store", "park", "school")), o=chooser.choice(("book", "ball", "key")))
        )
        keys.append((a, b, s))
        right.append(tokenizer(f" {io}").input_ids[0])
        wrong.append(tokenizer(f" {s}").input_ids[0])
    heads = [writer.name for writer in scores.graph.writers if writer.kind == HEAD]
    ordered = sorted(heads, key=lambda name: -abs(scores[name]))
    order_alone = [(key[0] == key[2],) for key in keys]
    hypotheses = {
        "all heads": (heads, keys),
        "12 heads": (ordered[:12], keys),
        "50 heads": (ordered[:50], keys),
        "50 others": (random.Random(0).sample(ordered[50:], 50), keys),
        "50 heads, which name is asked for": (ordered[:50], order_alone),
    }
    found = {}
    for name, (chosen, of_prompts) in hypotheses.items():
        result = causal_scrubbing(
            model,
            dict.fromkeys(chosen, of_prompts),
            texts,
            LogitDifference(right, wrong),
            resamplings=given.resamplings,
            tokenizer=tokenizer,
        )
        found[name] = {
            "recovered": result.recovered,
            "interval": result.interval,
            "scrubbed": float(result.scrubbed.mean()),
            "drawn_for_itself": result.facts["drawn_for_itself"],
        }
    return {"model": float(result.model.mean()), "random": float(result.random.mean()), "prompts": len(texts), "hypotheses": found}


# ---- DAS


def das(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    """The base prompt with the source's value of: the first or the second name is the one who is asked for. Other names in both."""
    chooser = random.Random(0)
    base, source, labels, positions = [], [], [], []
    for number in range(given.das_pairs):
        a, b, c, d = chooser.sample(NAMES, 4)
        template = PLACES[number % 2]
        words = [{"p": chooser.choice(("store", "park", "school")), "o": chooser.choice(("book", "ball", "key"))} for _ in range(2)]
        base_first, source_first = bool(number // 2 % 2), bool(number // 4 % 2)  # whether the first name is asked for
        base.append(template.format(a=a, b=b, s=b if base_first else a, **words[0]))
        source.append(template.format(a=c, b=d, s=d if source_first else c, **words[1]))
        labels.append(tokenizer(f" {a if source_first else b}").input_ids[0])
        positions.append([None] * (len(tokenizer(base[-1]).input_ids) - 1) + ["last"])
    pairs = Pairs.of(model, base, source, tokenizer=tokenizer, positions=positions)
    choices = [tokenizer(f" {name}").input_ids[0] for name in NAMES]
    whole = {layer: interchange(model, f"layers.{layer}.output", pairs, labels, choices=choices).accuracy for layer in (14, 17, 20, 23)}
    layer = max(whole, key=lambda number: whole[number])
    found = {}
    for rank in given.ranks:
        result = fit_das(
            model,
            f"layers.{layer}.output",
            pairs,
            labels,
            rank,
            choices=choices,
            steps=given.steps,
            batch=given.batch,
            held_out=0.5,
            placebos=3,
        )
        found[rank] = {**result.accuracies, "loss": result.facts["loss"]}
    return {"pairs": len(pairs), "whole_activation_by_layer": whole, "layer": layer, "ranks": found}


MEASURED: dict[str, Measured] = {"curves": curves, "rules": rules, "acdc": acdc_circuit, "scrubbing": scrubbing, "das": das}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(MEASURED))
    parser.add_argument("--task", choices=list(TASKS), default="ioi", help="of curves")
    parser.add_argument("--pairs", type=int, default=16, help="to find on, and as many others to measure on")
    parser.add_argument("--draws", type=int, default=1, help="random orders of the edges")
    parser.add_argument("--candidates", type=int, default=100, help="edges that ACDC tries")
    parser.add_argument("--threshold", type=float, default=0.02, help="of ACDC, in logits")
    parser.add_argument("--resamplings", type=int, default=4, help="of causal scrubbing")
    parser.add_argument("--das-pairs", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=20, help="of DAS")
    parser.add_argument("--batch", type=int, default=8, help="of DAS")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    model, tokenizer = steer.load("smollm2-135m")
    model = model.float().eval().requires_grad_(False)
    found = MEASURED[given.method](model, tokenizer, given)
    record = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "commit": commit_of(HERE.parent),
        "versions": {name: versions()[name] for name in ("torchsteer", "torch", "transformers")},
        "arguments": {key: value for key, value in vars(given).items() if not isinstance(value, Path) and key != "out"},
        **found,
        "cpu_seconds": time.process_time() - began,
    }
    print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
