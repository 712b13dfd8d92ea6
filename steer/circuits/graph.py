"""Graph of a circuit: named nodes and directed edges between them with scores, pruned, written to a file and read from one.

It knows nothing of what a node is beyond its kind, so that features, heads, MLPs and neurons have one form.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from steer import files
from steer.checks import whole_number
from steer.errors import ConfigError, DamagedFileError
from steer.reading import check_kinds, damage_of

KIND = "circuit"
TARGET = "target"
COMPONENT = "component"  # a head, an MLP or the embedding, by its name
_NODE_KEYS = {"kind": str, "site": str, "part": str, "index": (int, type(None)), "role": str}


@dataclass(frozen=True)
class Node:
    """Something in a model whose effect on a target is scored.

    Attributes:
        kind: `feature`, `error`, `embedding`, `component` or `target`.
        site: of the activation that it is a part of; empty for the target.
        part: name of the dictionary that it belongs to, or of a component; empty for none.
        index: of a feature.
        role: the tokens at which it is meant, by their label; empty for all of them.

    Example:
        >>> Node("feature", "layers.12.output", "sae", 371, "2").name
        'sae/371@2'
    """

    kind: str
    site: str = ""
    part: str = ""
    index: int | None = None
    role: str = ""

    @property
    def name(self) -> str:
        """`sae/371@2` is feature 371 of the dictionary `sae` at the tokens labelled 2; unique in a graph."""
        where = self.part or self.site
        what = {"feature": f"{where}/{self.index}", "error": f"{where}/error", TARGET: TARGET}.get(self.kind, where)
        return what + (f"@{self.role}" if self.role else "")


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes and edges of a circuit.

    Attributes:
        nodes: in the order in which a forward pass reaches them.
        scores: [nodes] fp32, how much higher the target is with a node than with its baseline in its place, to first order. That of the
            target itself is 0.
        edges: [edges, 2] places of source and receiver in `nodes`. weights: [edges] fp32, the part of the source's score that goes
            through that receiver with no other node between them.
        facts: how it was made, JSON-able.

    Raises:
        ConfigError: tensors that do not fit the nodes, an edge that leads to none, or two nodes of one name.

    Example:
        >>> graph = scores.drawing(edges=20)
        >>> [node.name for node in graph.nodes], graph.pruned(5).edges.shape  # [edges, 2]
    """

    nodes: tuple[Node, ...]
    scores: Tensor
    edges: Tensor
    weights: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, m = len(self.nodes), len(self.weights)
        shapes = {"scores": [n], "edges": [m, 2], "weights": [m]}
        for name, shape in shapes.items():
            if list(getattr(self, name).shape) != shape:
                raise _wrong_shape(name, shape, getattr(self, name))
        if len({node.name for node in self.nodes}) < n:
            raise _name_twice([node.name for node in self.nodes])
        if m and not 0 <= int(self.edges.min()) <= int(self.edges.max()) < n:
            raise _no_such_node(self.edges, n)

    def __repr__(self) -> str:
        return f"Graph({len(self.nodes)} nodes, {len(self.weights)} edges)"

    def __getitem__(self, name: str) -> float:
        """The score of a node. Raises ConfigError where there is none of that name."""
        return float(self.scores[self._place(name)])

    def weight(self, source: str, receiver: str) -> float:
        """Of the edge between two nodes, by their names; 0 where there is none."""
        ends = torch.tensor([self._place(source), self._place(receiver)])
        return float(self.weights[(self.edges == ends).all(1)].sum())

    def _place(self, name: str) -> int:
        for place, node in enumerate(self.nodes):
            if node.name == name:
                return place
        raise _unknown_node(name, self)

    def of_kind(self, *kinds: str) -> list[Node]:
        """Nodes of some kinds, in order."""
        return [node for node in self.nodes if node.kind in kinds]

    # ---- smaller graphs

    def pruned(self, edges: int) -> Self:
        """So many edges, and the nodes at their ends: from the target backwards, always the strongest edge into what has been reached.

        Every node that stays therefore has a path to the target.
        """
        whole_number(edges, "the number of edges")
        sizes = self.weights.abs().tolist()
        into: dict[int, list[int]] = {}
        for edge, receiver in enumerate(self.edges[:, 1].tolist()):
            into.setdefault(receiver, []).append(edge)
        reached = {place for place, node in enumerate(self.nodes) if node.kind == TARGET}
        open_edges = [(-sizes[edge], edge) for place in reached for edge in into.get(place, [])]
        heapq.heapify(open_edges)
        kept: list[int] = []
        while open_edges and len(kept) < edges:
            _, edge = heapq.heappop(open_edges)
            kept.append(edge)
            source = int(self.edges[edge, 0])
            if source not in reached:
                reached.add(source)
                for further in into.get(source, []):
                    heapq.heappush(open_edges, (-sizes[further], further))
        is_in = torch.tensor([place in reached for place in range(len(self.nodes))])
        return self._subgraph(is_in, torch.tensor(sorted(kept), dtype=torch.long))

    def _subgraph(self, is_in: Tensor, edges: Tensor) -> Self:
        """is_in: [nodes] bool. edges: places of those that stay, whose ends are all in."""
        places = is_in.cumsum(0) - 1
        nodes = tuple(node for node, stays in zip(self.nodes, is_in.tolist(), strict=True) if stays)
        return type(self)(nodes, self.scores[is_in], places[self.edges[edges]], self.weights[edges], self.facts)

    # ---- files

    def save(self, path: str | Path, **more: Any) -> Path:
        """Writes manifest and tensors, atomically. more: further keys of the manifest, JSON-able."""
        manifest = {"nodes": [asdict(node) for node in self.nodes], "facts": self.facts, **more}
        tensors = {"scores": self.scores, "edges": self.edges, "weights": self.weights}
        return files.save_artifact(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: str | Path) -> tuple[Self, dict[str, Any]]:
        """The graph, and the whole manifest. Raises as `load`.

        Raises:
            DamagedFileError: a file that holds no consistent graph.
        """
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, "a circuit with its nodes, scores, edges and weights"):
            check_kinds({key: manifest[key] for key in ("nodes", "facts")}, {"nodes": list, "facts": dict})
            for node in manifest["nodes"]:
                check_kinds(node, _NODE_KEYS)
            nodes = tuple(Node(**{key: node[key] for key in _NODE_KEYS}) for node in manifest["nodes"])
            try:
                return cls(nodes, tensors["scores"], tensors["edges"], tensors["weights"], manifest["facts"]), manifest
            except ConfigError as error:
                raise _damaged(path, error) from error


def joined_edges(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Edges [edges, 2] and their weights [edges] from parts of both."""
    edges = [edges for edges, _ in parts] or [torch.empty(0, 2, dtype=torch.long)]
    return torch.cat(edges), torch.cat([weights for _, weights in parts] or [torch.empty(0)])


# ---- errors


def _wrong_shape(name: str, shape: list[int], found: Tensor) -> ConfigError:
    return ConfigError(
        f"`{name}` of a graph do not fit its nodes and edges",
        expected=shape,
        found=list(found.shape),
        remedy="one score for each node, one weight and two ends for each edge",
    )


def _name_twice(names: list[str]) -> ConfigError:
    twice = sorted({name for name in names if names.count(name) > 1})
    return ConfigError("two nodes of a graph have one name", expected="names that are unique", found=twice[:5], remedy="leave one out")


def _no_such_node(edges: Tensor, count: int) -> ConfigError:
    return ConfigError(
        "an edge of a graph leads to no node",
        expected=f"places from 0 to {count - 1}",
        found=[int(edges.min()), int(edges.max())],
        remedy="number the nodes in their order",
    )


def _unknown_node(name: str, graph: Graph) -> ConfigError:
    return ConfigError(
        f"the graph has no node '{name}'",
        expected="a node of the graph, as `node.name` says it",
        found=f"{name!r}; the graph has {', '.join(node.name for node in graph.nodes[:8])}{', ...' * (len(graph.nodes) > 8)}",
        remedy="it may have been pruned; ask for more nodes or edges",
    )


def _damaged(path: str | Path, error: ConfigError) -> DamagedFileError:
    return DamagedFileError(
        f"{path} holds no consistent circuit",
        expected="scores, edges and weights that fit its nodes",
        found=str(error).split("\n")[0],
        remedy="restore it from a backup, or attribute again",
    )
