"""Circuits and scores of a model's own graph from and to circuit files of EAP-IG and MIB: key-value groups, signs, and whose they are.

A file has a key and a value reader for every query head, and does not say which sign its scores have. EAP-IG multiplies what the corrupted
run writes more than the clean one with the gradient of what its metric returns:

    `helps`              the metric was called with loss=True, so that it returned minus the target; MIB, and the scores of this library
    `corruption_raises`  the metric returned the target itself: positive where the corrupted value raises it

What a file cannot say is refused on the way out: amounts between 0 and 1, neurons of MLPs, blocks of different shape.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.circuits.components import ComponentGraph, check_heads_share
from steer.circuits.key_value_groups import grouped, groups_in_part, ungrouped
from steer.circuits.mib import read_mib, write_mib
from steer.circuits.mib_circuit import MibCircuit, MibShape
from steer.circuits.stream_readers import stream_readers
from steer.errors import ConfigError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.reading import place_of

SIGNS = {"helps": 1, "corruption_raises": -1}  # times a score of this library


@dataclass(frozen=True, eq=False)
class MibContent:
    """What a file says about a model's own graph.

    Attributes:
        nodes: [writers] bool. edges: [writers, readers] bool; None where all edges of its nodes are in it, which is a circuit of nodes.
        node_scores: [writers] fp64. edge_scores: [writers, readers] fp64; None where only nodes were scored.
        facts: the model, the file and its SHA-256, and what was changed. JSON-able.
    """

    graph: ComponentGraph
    nodes: Tensor
    edges: Tensor | None
    node_scores: Tensor
    edge_scores: Tensor | None
    facts: dict[str, Any]


def mib_shape(graph: ComponentGraph, facts: Mapping[str, Any]) -> MibShape:
    """The `cfg` of a graph's file. facts: of a circuit or scores. Raises ConfigError where blocks differ, or the model is not known."""
    heads, parallel = {shape.heads for shape in graph.layers}, {shape.parallel for shape in graph.layers}
    if len(heads) > 1 or len(parallel) > 1:
        raise _different_blocks(heads, parallel)
    if "model" not in facts:
        raise _no_model()
    return MibShape(len(graph.layers), heads.pop(), facts["model"]["width"], parallel.pop())


def chosen_in_mib(graph: ComponentGraph, nodes: Tensor, edges: Tensor | None, n_neurons: int) -> tuple[Tensor, Tensor]:
    """Nodes [writers] and edges [writers, ungrouped readers], bool: of a circuit of nodes all edges out of them, as EAP-IG does.

    Raises:
        ConfigError: a circuit that holds parts of nodes, or neurons.
    """
    if n_neurons:
        raise _neurons(n_neurons)
    if bool(((nodes != 0) & (nodes != 1)).any()):
        raise _amounts(nodes)
    is_in = nodes != 0
    own = is_in[:, None] & graph.possible if edges is None else edges & graph.possible
    return is_in if edges is None else own.any(1), _ungrouped(graph, own)


def write_scores(path: str | Path, shape: MibShape, graph: ComponentGraph, scores: tuple[Tensor, Tensor | None],
                 chosen: tuple[Tensor, Tensor], sign: str) -> Path:  # fmt: skip
    """Writes scores of nodes [writers] and edges [writers, readers], beside what was chosen. Raises ConfigError for another sign."""
    one_of(sign, tuple(SIGNS), "the sign of scores in a file")
    node_scores, edge_scores = scores
    of_edges = torch.zeros_like(chosen[1], dtype=torch.float64) if edge_scores is None else _ungrouped(graph, edge_scores)
    return write_mib(path, MibCircuit(shape, of_edges * SIGNS[sign], chosen[1], chosen[0], node_scores * SIGNS[sign]))


def _ungrouped(graph: ComponentGraph, edges: Tensor) -> Tensor:
    return ungrouped(edges, graph.layers[0].heads, [shape.groups for shape in graph.layers])


def read_for_model(path: str | Path, model: nn.Module, sign: str) -> MibContent:
    """What a file says about a model. Nodes without a score get the sum of those of their edges, which it is to first order.

    Raises:
        WrongModelError: the file of a model of another shape. ConfigError: another sign, residual channels told apart, or nodes unscored.
        Those of `read_mib`.
    """
    one_of(sign, tuple(SIGNS), "the sign of scores in a file")
    anatomy = Anatomy.find(model)
    check_heads_share(anatomy)
    graph = ComponentGraph.of(anatomy, [block.parallel for block in stream_readers(model, anatomy)])
    file, facts = read_mib(path), {"model": anatomy.fingerprint()}
    if (expected := mib_shape(graph, facts)) != file.shape:
        raise _other_shape(expected, file.shape)
    if file.neurons is not None and not bool(file.neurons[file.nodes].all()):
        raise _channels()
    heads, groups = graph.layers[0].heads, [shape.groups for shape in graph.layers]
    edges, scores = grouped(file.edges, heads, groups), grouped(file.scores.double(), heads, groups) * SIGNS[sign]
    imported: dict[str, Any] = {"file": place_of(path).name, "sha256": hashlib.sha256(place_of(path).read_bytes()).hexdigest()}
    if in_part := list(graph.edges(groups_in_part(file.edges, heads, groups))):
        imported["widened"] = in_part
        warnings.warn(
            f"{len(in_part)} edges go to some heads of a key-value group in this file, and to the whole group here: {in_part[0]}, ...",
            stacklevel=3,
        )
    node_scores, without = _node_scores(graph, file, scores, sign)
    if without:
        imported["nodes_scored_by_their_edges"] = without
    nodes = edges.any(1) if bool(edges.any()) else file.nodes
    of_nodes = not bool(edges.any()) or torch.equal(edges, nodes[:, None] & graph.possible)
    return MibContent(
        graph, nodes, None if of_nodes else edges, node_scores, scores if bool(scores.any()) else None, {**facts, "imported": imported}
    )


def _node_scores(graph: ComponentGraph, file: MibCircuit, scores: Tensor, sign: str) -> tuple[Tensor, int]:
    """[writers] scores of nodes, and how many of them are sums over edges."""
    of_edges = scores.sum(1)
    if file.node_scores is None:
        return of_edges, len(of_edges)
    own = file.node_scores.double() * SIGNS[sign]
    missing = own.isnan()
    if bool(missing.any()) and not bool(scores.any()):
        raise _unscored([writer.name for writer, is_missing in zip(graph.writers, missing.tolist(), strict=True) if is_missing])
    return torch.where(missing, of_edges, own), int(missing.sum())


# ---- errors


def _neurons(count: int) -> ConfigError:
    return ConfigError("a circuit file of EAP-IG or MIB has no neurons of MLPs", expected="a circuit of nodes or edges",
                       found=f"{count} neurons", remedy="save it with circuit.save")  # fmt: skip


def no_circuit_in(path: str | Path) -> ConfigError:
    return ConfigError(f"'{path}' marks nothing as in the circuit", expected="nodes or edges with in_graph true", found="scores alone",
                       remedy="read ComponentScores.import_mib and choose, for example top_edges")  # fmt: skip


def _different_blocks(heads: set[int], parallel: set[bool]) -> ConfigError:
    return ConfigError(
        "a circuit file of EAP-IG or MIB has one shape for all blocks",
        expected="as many heads in every block, all parallel or none",
        found=f"{sorted(heads)} heads, parallel {sorted(parallel)}",
        remedy="save it in this library's own form",
    )


def _no_model() -> ConfigError:
    return ConfigError(
        "a circuit file of EAP-IG or MIB holds the width of the model, which is not known here",
        expected="`model` among the facts",
        found="none",
        remedy="make it with attribute or Circuit.of_nodes, or give facts={'model': Anatomy.find(model).fingerprint()}",
    )


def _amounts(nodes: Tensor) -> ConfigError:
    return ConfigError(
        "a circuit file of EAP-IG or MIB has nodes that are in the circuit or not, and nothing between",
        expected="amounts of 0 or 1",
        found=sorted({round(amount, 3) for amount in nodes.tolist()})[:6],
        remedy="round them first: dataclasses.replace(circuit, nodes=(circuit.nodes > 0.5).double())",
    )


def _other_shape(expected: MibShape, found: MibShape) -> WrongModelError:
    return WrongModelError("the circuit file is that of a model of another shape", expected=repr(expected), found=repr(found),
                           remedy="load the model that the file was made with")  # fmt: skip


def _channels() -> ConfigError:
    return ConfigError(
        "the circuit file tells channels of what a node writes apart, which circuits of this library do not",
        expected="all channels of each of its nodes",
        found="some",
        remedy="write it again without EAP-IG's neurons, or read the matrices with steer.circuits.mib.read_mib",
    )


def _unscored(names: list[str]) -> ConfigError:
    return ConfigError("the circuit file scores some nodes only, and no edges", expected="a score of every node",
                       found=f"none of {', '.join(names[:4])}", remedy="attribute again with EAP-IG")  # fmt: skip
