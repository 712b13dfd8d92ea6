"""Feature circuits of subject-verb agreement on the embedded model, with the two dictionaries that come with the library.

    python benchmarks/feature_circuit.py [--nodes 60] [--edges 600] [--exact 24] [--only plain ...] [--out FILE] [--page FILE]

Prompts such as "The boys near the car", whose verb is `are` and not `is`; the target is the logit of the right verb less that of the other
one. For each way of attributing: the share that errors carry, the target while the circuit or random features are ablated, the same on
prompts with other nouns, the correlation of scores with exact ablation of single nodes, and CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import steer
from steer.circuits import FeatureCircuit
from steer.report import write_circuit

NOUNS = ("boy", "girl", "teacher", "author", "doctor", "farmer")
OTHERS = ("king", "pilot", "student", "artist")
NEAR = ("house", "tree", "car", "river")
DICTIONARIES = {"transcoder": "smollm2-135m-transcoder-12", "sae": "smollm2-135m-sae-12"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "integrated": {"steps": 10},
    "linear": {"gradient": "linear"},
    "mean": {"baseline": "mean"},
}


def prompts_of(nouns: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    """Texts of the same number of tokens, and whether the subject is plural."""
    pairs = [(f"The {noun}{ending} near the {NEAR[i % len(NEAR)]}", bool(ending)) for i, noun in enumerate(nouns) for ending in ("", "s")]
    return [text for text, _ in pairs], [is_plural for _, is_plural in pairs]


def target_of(tokenizer: Any, is_plural: list[bool]) -> steer.LogitDifference:
    one, many = (tokenizer(verb, add_special_tokens=False).input_ids[0] for verb in (" is", " are"))
    return steer.LogitDifference([many if plural else one for plural in is_plural], [one if plural else many for plural in is_plural])


def measured(circuit: FeatureCircuit, held_out: Any, seconds: float) -> dict[str, Any]:
    """What the results page says of one circuit."""
    strongest = sorted(circuit.graph.of_kind("feature", "error"), key=lambda node: -abs(circuit.graph[node.name]))[:12]
    assert circuit.faithfulness is not None and circuit.exact is not None
    return {
        "cpu_seconds": round(seconds, 1),
        "nodes": len(circuit.graph.nodes),
        "edges": len(circuit.graph.weights),
        "features": {name: len(features) for name, features in circuit.features.items()},
        "error_share": dict(circuit.error_share),
        "target": vars(circuit.faithfulness),
        "shares": circuit.faithfulness.shares(),
        "held_out_target": vars(held_out),
        "held_out_shares": held_out.shares(),
        "exact_correlation": circuit.exact.correlation,
        "exact_rank_correlation": circuit.exact.rank_correlation,
        "score_and_exact": {
            name: [round(float(score), 4), round(float(exact), 4)]
            for name, score, exact in zip(circuit.exact.names, circuit.exact.attributed, circuit.exact.exact, strict=True)
        },
        "strongest": {node.name: circuit.graph[node.name] for node in strongest},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=60)
    parser.add_argument("--edges", type=int, default=600)
    parser.add_argument("--exact", type=int, default=24)
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="page of the first circuit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = steer.load("smollm2-135m")
    dictionaries = {name: steer.load_dictionary(place) for name, place in DICTIONARIES.items()}
    texts, is_plural = prompts_of(NOUNS)
    others, other_plural = prompts_of(OTHERS)
    result: dict[str, Any] = {
        "setting": {
            "prompts": len(texts),
            "held_out": len(others),
            "nodes": arguments.nodes,
            "edges": arguments.edges,
            "positions": "each",
        },
        "versions": {"steer": steer.__version__, "torch": torch.__version__},
        "ways": {},
    }
    table = Table(
        "", "CPU s", "errors carry", "all", "circuit", "errors alone", "random", "without circuit", "without random", "held out", "r"
    )
    for way in arguments.only:
        begin = time.process_time()
        sizes = {"nodes": arguments.nodes, "edges": arguments.edges, "exact": arguments.exact}
        circuit = steer.feature_circuit(
            model, dictionaries, texts, target_of(tokenizer, is_plural), positions="each", embedding=False, **sizes, **WAYS[way]
        )
        seconds = time.process_time() - begin
        baseline = {"baseline": "mean", "reference": texts} if WAYS[way].get("baseline") == "mean" else {}
        held_out = circuit.faithfulness_on(model, others, target_of(tokenizer, other_plural), positions="each", **baseline)
        found = result["ways"][way] = measured(circuit, held_out, seconds)
        target = found["target"]
        table.add_row(
            way,
            f"{seconds:.0f}",
            ", ".join(f"{share:.2f}" for share in found["error_share"].values()),
            *(f"{target[name]:.2f}" for name in ("full", "circuit", "errors_alone", "random", "without_circuit", "without_random")),
            f"{found['held_out_target']['full']:.2f} > {found['held_out_target']['without_circuit']:.2f}",
            f"{found['exact_correlation']:.3f}",
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        if arguments.page and way == arguments.only[0]:
            write_circuit(arguments.page, circuit)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
