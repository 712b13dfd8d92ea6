"""Circuits of three tasks on the embedded SmolLM2-135M: indirect objects, greater-than, and which of two decimals is larger.

    OMP_NUM_THREADS=1 python benchmarks/circuit_tasks.py ioi|greater_than|decimals [--pairs 24] [--edges 50 200 1000] [--out FILE]

ioi: "When John and Mary got to the park, Mary handed the ball to": the logit of John less that of Mary; counterfactual: the second name in
the last place. greater_than: "The war lasted from the year 1741 to the year 17": probability of two-digit years above 41 less that of the
others, in the digits of this tokenizer; counterfactual: 01. Circuits are found by EAP-IG on one half of the prompts and measured on the
other, everything outside ablated to the counterfactual, beside random circuits of the same size. decimals: neurons of the prompt that lower
the log-probability of the larger number, found on one half of the pairs of numbers, set to 0 and measured on the other half, beside as
many random neurons.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steer
from steer.circuits import Circuit, ComponentEvaluation, LogitDifference, Pairs, attribute, resample_ablation, zero_ablation
from steer.circuits.attribution_methods.eap_ig import EAPIG
from steer.circuits.targets import Target
from steer.model.tokens import Row, encode

NAMES = ("John", "Mary", "Tom", "Anna", "James", "Sarah", "Paul", "Laura", "David", "Emma", "Mark", "Alice")
PLACES = ("Then, {a} and {b} went to the {p}. {s} gave a {o} to", "When {a} and {b} got to the {p}, {s} handed the {o} to")
# name movers, negative ones, S2 inhibition, induction, duplicate and previous tokens, backups (Wang et al. 2022, arXiv 2211.00593)
GPT2_IOI = set(
    "9.9 10.0 9.6 10.7 11.10 7.3 7.9 8.6 8.10 5.5 5.8 5.9 6.9 0.1 0.10 3.0 2.2 4.11 10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9".split()
)
NOUNS = ("war", "project", "voyage", "reign", "contract", "dispute", "campaign", "strike")


def ioi(model: nn.Module, tokenizer: Any, count: int, seed: int) -> tuple[Pairs, Target]:
    chooser = random.Random(seed)
    clean, corrupted, right, wrong = [], [], [], []
    for number in range(count):
        a, b = chooser.sample(NAMES, 2)
        words = {"p": chooser.choice(("store", "park", "school")), "o": chooser.choice(("book", "ball", "key"))}
        # the one who is named first is asked for in half of the prompts
        s, io = (b, a) if number % 4 < 2 else (a, b)
        template = PLACES[number % 2]
        clean.append(template.format(a=a, b=b, s=s, **words))
        corrupted.append(template.format(a=a, b=b, s=io, **words))
        right.append(tokenizer(f" {io}").input_ids[0])
        wrong.append(tokenizer(f" {s}").input_ids[0])
    return Pairs.of(model, clean, corrupted, tokenizer=tokenizer), LogitDifference(right, wrong)


class GreaterThan:
    """Probability of the first digits that lead above a year less that of those that lead below it, at the last token."""

    at_last_token = True

    def __init__(self, tokenizer: Any, tens: list[int]) -> None:
        self.digits = torch.tensor([tokenizer(str(digit)).input_ids[-1] for digit in range(10)])
        self.tens = tens

    def __call__(self, logits: Tensor, prompt: int) -> Tensor:
        p = logits[-1].softmax(-1)[self.digits]  # [10], of the digit of the tens
        return p[self.tens[prompt] + 1 :].sum() - p[: self.tens[prompt]].sum()


def greater_than(model: nn.Module, tokenizer: Any, count: int, seed: int) -> tuple[Pairs, Target]:
    chooser = random.Random(seed)
    clean, corrupted, tens = [], [], []
    for _ in range(count):
        century, ten, unit = chooser.randint(11, 18), chooser.randint(2, 7), chooser.randint(1, 9)
        text = f"The {chooser.choice(NOUNS)} lasted from the year {century}{{}} to the year {century}"
        clean.append(text.format(f"{ten}{unit}"))
        corrupted.append(text.format("01"))
        tens.append(ten)
    return Pairs.of(model, clean, corrupted, tokenizer=tokenizer), GreaterThan(tokenizer, tens)


def circuit_of(model: nn.Module, tokenizer: Any, make: Callable[..., tuple[Pairs, Target]], count: int, sizes: list[int]) -> dict[str, Any]:
    """Found on one half, measured on the other."""
    pairs, target = make(model, tokenizer, count, 0)
    others, other_target = make(model, tokenizer, count, 1)
    began = time.process_time()
    scores = attribute(model, pairs, target, method=EAPIG(5))
    seconds = time.process_time() - began
    heads = scores.top_nodes(12)
    evaluation = ComponentEvaluation(model, others, other_target, resample_ablation())
    exact = evaluation.exact_effects(scores, 24)
    rows = []
    for size in sizes:
        circuit = scores.top_edges(size)
        found = evaluation.faithfulness(circuit, draws=3)
        rows.append(
            {
                "edges": int(circuit.edges.sum()) if circuit.edges is not None else 0,
                "faithfulness": found.faithfulness,
                "random": found.random_faithfulness,
            }
        )
    return {
        "value": scores.facts["value"],
        "corrupted_value": scores.facts["corrupted_value"],
        "heads": {name: round(scores[name], 3) for name in sorted(heads.node_names, key=lambda name: -abs(scores[name]))},
        "mlp0": scores["m0"],
        "correlation_with_exact": exact.correlation,
        "rank_correlation_with_exact": exact.rank_correlation,
        "circuits": rows,
        "attribution_cpu_seconds": seconds,
    }


# ---- decimals


def decimals(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Neurons that pull towards the smaller number, found on pairs such as 9.11 and 9.9, whose smaller one has a 1 behind the point.

    In the control, pairs such as 9.11 and 9.04, the larger one does: what only takes the digit 1 away fails there.
    """
    numbers = [(whole, f"{digit}", f"{two}") for whole in range(2, 10) for digit, two in ((9, 11), (8, 12), (7, 14), (6, 13))]
    random.Random(0).shuffle(numbers)
    control = [(whole, f"{two}", f"0{digit}") for whole in range(2, 10) for digit, two in ((4, 11), (7, 12))]

    def prompts(half: list[tuple[int, str, str]]) -> tuple[list[Row], list[int], list[int]]:
        rows, right, wrong = [], [], []
        for number, (whole, larger, smaller) in enumerate(half):
            both = (f"{whole}.{smaller}", f"{whole}.{larger}")
            said = both if number % 2 else both[::-1]
            row = encode(tokenizer, f"Which number is larger, {said[0]} or {said[1]}? Answer with the number alone.")
            rows.append(Row((*row.ids, *tokenizer(f"{whole}.").input_ids), 0))
            right.append(tokenizer(larger[0]).input_ids[-1])
            wrong.append(tokenizer(smaller[0]).input_ids[-1])
        return rows, right, wrong

    find, test, other = prompts(numbers[: len(numbers) // 2]), prompts(numbers[len(numbers) // 2 :]), prompts(control)
    pairs = Pairs.of(model, find[0], find[0])
    scores = attribute(model, pairs, LogitDifference(find[1], find[2]), method="eap", edges=False, neurons=True, ablation=zero_ablation())
    flat = torch.cat([of_block.sum(0) for of_block in scores.neurons.values()])
    rows = []
    for size in (10, 100, 1000):
        circuit = _neurons(scores.graph, flat, flat.argsort()[:size], scores.facts["model"])  # without which the larger one is likelier
        drawn = [circuit.random(seed) for seed in range(3)]
        random_gaps = [_gap(model, each, test)["gap"] for each in drawn]
        rows.append({"neurons": size, "ablated": _gap(model, circuit, test), "control": _gap(model, circuit, other), "random": random_gaps})
    return {"found_on": len(find[0]), "plain": _gap(model, None, test), "plain_control": _gap(model, None, other), "rows": rows}


def _neurons(graph: Any, flat: Tensor, chosen: Tensor, model: Any) -> Circuit:
    amounts = torch.zeros_like(flat)
    amounts[chosen] = 1
    parts = amounts.view(len(graph.layers), -1)
    neurons = {layer: part for layer, part in enumerate(parts) if part.any()}
    return Circuit(
        graph, torch.zeros(len(graph.writers), dtype=torch.float64), neurons=neurons, ablation=zero_ablation(), facts={"model": model}
    )


@torch.no_grad()
def _gap(model: nn.Module, circuit: Circuit | None, prompts: tuple[list[Row], list[int], list[int]]) -> dict[str, float]:
    """Mean logit of the next digit of the larger number less that of the smaller one's, and the share of prompts where it is above 0."""
    values = []
    with nullcontext() if circuit is None else circuit.ablation_plan(model).attached(model):
        for row, right, wrong in zip(*prompts, strict=True):
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, -1]
            values.append(float(logits[right] - logits[wrong]))
    return {"gap": sum(values) / len(values), "accuracy": sum(value > 0 for value in values) / len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("ioi", "greater_than", "decimals"))
    parser.add_argument("--model", default="smollm2-135m", help="e.g. gpt2, whose published heads of ioi are looked for")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--edges", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = steer.load(options.model)
    model = model.float().eval()
    if options.task == "decimals":
        result = decimals(model, tokenizer)
    else:
        make = {"ioi": ioi, "greater_than": greater_than}[options.task]
        result = circuit_of(model, tokenizer, make, options.pairs, options.edges)
    if options.task == "ioi" and model.config.model_type == "gpt2" and model.config.n_layer == 12:
        found = {name.removeprefix("a").replace(".h", ".") for name in result["heads"]}
        result["published_heads_among_the_strongest"] = sorted(found & GPT2_IOI)
    result = {"task": options.task, "model": options.model, **result}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
