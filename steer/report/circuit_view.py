"""The circuits of an experiment on its page: the strongest edges as a drawing, and how much of each block every circuit ablates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steer.circuits.graph import Graph, Node
from steer.report.canvas import both_widths
from steer.report.circuit_plot import draw_circuit
from steer.report.numbers import number

SHOWN = 12  # components of a circuit that are named


def circuit_content(metrics: Mapping[str, Any], markup: Any) -> dict[str, Any] | None:
    """What the template of the section is given; None for an experiment without circuits."""
    found = metrics.get("circuits")
    if not found:
        return None
    graph = _graph(found["graph"])
    said = [
        f"{node.part or node.kind}, score {number(float(score), signed=True)}"
        for node, score in zip(graph.nodes, graph.scores, strict=True)
    ]
    title = "The strongest edges between components"
    words = f"{len(graph.nodes)} components and {len(graph.weights)} edges, by integrated gradients."
    drawn = both_widths(draw_circuit, graph, {"": "all tokens"}, said, key="circuit", title=title, description=words)
    return {"drawn": markup(drawn), "words": words, "rows": [_row(made) for made in found["made"]]}


def _graph(found: Mapping[str, Any]) -> Graph:
    nodes = tuple(Node(**node) for node in found["nodes"])
    edges = torch.tensor(found["edges"], dtype=torch.long).view(-1, 2)
    return Graph(nodes, torch.tensor(found["scores"]), edges, torch.tensor(found["weights"]))


def _row(made: Mapping[str, Any]) -> dict[str, Any]:
    nodes = sorted(made["nodes"].items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {number(amount)}" for name, amount in nodes[:SHOWN]) + (", ..." if len(nodes) > SHOWN else "")
    neurons = {int(layer): amount for layer, amount in made["neurons"].items()}
    busiest = sorted(neurons, key=lambda layer: -neurons[layer])[:5]
    return {
        "method": made["method"],
        "nodes": named or "none",
        "neurons": f"{number(sum(neurons.values()))} in all, most in blocks {', '.join(map(str, sorted(busiest)))}" if neurons else "none",
        "ablation": f"{made['ablation']['kind']} of {made['ablation']['tokens']:,} tokens" if made.get("ablation") else "",
    }
