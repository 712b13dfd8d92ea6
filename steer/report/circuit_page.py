"""The page of a feature circuit: its drawing, what was measured of it, and its nodes and edges as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.checks import of_type
from steer.circuits import FeatureCircuit
from steer.circuits.graph import Graph, Node
from steer.report.canvas import both_widths, short
from steer.report.circuit_plot import draw_circuit
from steer.report.numbers import number
from steer.report.render import markup, write_page

Examples = Mapping[str, Mapping[int, Sequence[str]]]
SHOWN = 3  # examples of a feature under the pointer
MEASURED = {
    "full": "Nothing ablated",
    "circuit": "All features but the circuit's ablated, errors kept",
    "random": "The same for as many random features",
    "errors_alone": "All features ablated, errors kept",
    "circuit_alone": "All but the circuit's features ablated, errors too",
    "random_alone": "The same for as many random features",
    "without_circuit": "The circuit's features ablated, all else kept",
    "without_random": "The same for as many random features",
    "empty": "All features and errors ablated",
}


def write_circuit(path: str | Path, circuit: FeatureCircuit, *, tokenizer: Any = None, examples: Examples | None = None) -> Path:
    """Writes a circuit as one HTML page that works offline, light or dark as the reader's system is.

    Args:
        tokenizer: puts the tokens of the prompt above the columns of a circuit of one prompt with positions='each'.
        examples: texts on which features are on, by name of the dictionary and feature, shown under the pointer and in the table.

    Raises:
        ConfigError: matplotlib or jinja2 is missing. StorageFullError.

    Example:
        >>> found = steer.feature_circuit(model, {"sae": dictionary}, texts, target, nodes=4, edges=4, draws=1)
        >>> steer.report.write_circuit("circuit.html", found)
        PosixPath('circuit.html')
    """
    of_type(circuit, FeatureCircuit, "the circuit of a page", "make one with steer.feature_circuit")
    graph, examples = circuit.graph, examples or {}
    titles = _titles(graph, tokenizer)
    said = [_said(node, float(score), examples) for node, score in zip(graph.nodes, graph.scores, strict=True)]
    title = f"Circuit of the {graph.facts.get('target', 'target')}"
    description = f"{len(graph.nodes)} nodes and {len(graph.weights)} edges in {len(titles)} columns of tokens."
    drawn = both_widths(draw_circuit, graph, titles, said, key="circuit", title=title, description=description)
    return write_page(
        path,
        "circuit.html",
        title=title,
        drawn=markup()(drawn),
        facts={name: value for name, value in _facts(circuit).items() if value is not None},
        measured=_measured(circuit),
        exact=circuit.exact,
        nodes=_node_rows(graph, examples),
        edges=_edge_rows(graph),
    )


def _titles(graph: Graph, tokenizer: Any) -> dict[str, str]:
    """Column heads by role, in the order of the prompts."""
    roles: list[str] = list(graph.facts.get("roles") or [""])
    tokens = graph.facts.get("tokens")
    if tokenizer is None or not tokens or graph.facts.get("positions") != "each":
        return {role: role or "all tokens" for role in roles}
    return {role: tokenizer.decode([tokens[int(role)]]).strip() or role for role in roles}


def _said(node: Node, score: float, examples: Examples) -> str:
    words = f"{node.name}, score {number(score, signed=True)}" if node.kind != "target" else node.name
    texts = examples.get(node.part, {}).get(node.index, ()) if node.index is not None else ()
    return " | ".join([words, *(short(text, 90) for text in texts[:SHOWN])])


def _facts(circuit: FeatureCircuit) -> dict[str, str | None]:
    facts, found = circuit.graph.facts, circuit.faithfulness
    return {
        "Target": f"{facts.get('target')}, {number(facts['value'])}" if "value" in facts else None,
        "Prompts": str(facts.get("prompts")),
        "Nodes and edges": f"{len(circuit.graph.nodes)} and {len(circuit.graph.weights)}",
        "Baseline": facts.get("baseline"),
        "Gradient": f"{facts.get('gradient')}" + (f", integrated over {facts['steps']} steps" if facts.get("steps") else ""),
        **{f"Carried by errors of {name}": f"{share:.0%}" for name, share in circuit.error_share.items()},
        "Random features": None if found is None or found.drawn_share == 1 else f"{found.drawn_share:.0%} of the circuit's number were on",
    }


def _measured(circuit: FeatureCircuit) -> list[tuple[str, str, str]]:
    """What is ablated, the target, and the share of what the model has beyond everything ablated."""
    found = circuit.faithfulness
    if found is None:
        return []
    return [(words, number(getattr(found, name)), f"{found.share(name):.2f}") for name, words in MEASURED.items()]


def _node_rows(graph: Graph, examples: Examples) -> list[dict[str, Any]]:
    order = graph.scores.abs().argsort(descending=True).tolist()
    return [
        {
            "name": node.name,
            "site": node.site,
            "score": number(float(graph.scores[place]), signed=True),
            "examples": [short(text, 90) for text in list(examples.get(node.part, {}).get(node.index, ()))[:SHOWN]]
            if node.index is not None
            else [],
        }
        for place in order
        if (node := graph.nodes[place]).kind != "target"
    ]


def _edge_rows(graph: Graph) -> list[tuple[str, str, str]]:
    order = graph.weights.abs().argsort(descending=True).tolist()
    ends = [graph.edges[place].tolist() for place in order]
    return [
        (graph.nodes[a].name, graph.nodes[b].name, number(float(graph.weights[place]), signed=True))
        for place, (a, b) in zip(order, ends, strict=True)
    ]
