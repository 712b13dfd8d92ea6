"""Scores of the components of a model and of the edges between them, and circuits chosen by them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steer import files
from steer.checks import one_of, whole_number
from steer.circuits.circuit import Circuit
from steer.circuits.components import HEAD, INPUT, MLP, ComponentGraph, Writer
from steer.circuits.graph import COMPONENT, TARGET, Graph, Node
from steer.circuits.mib_exchange import chosen_in_mib, mib_shape, read_for_model, write_scores
from steer.errors import ConfigError, NonFiniteError, WrongModelError
from steer.reading import check_kinds, damage_of

KIND = "component scores"


@dataclass(frozen=True, eq=False)
class ComponentScores:
    """How much higher a target is with each component, or edge, than with what takes its place; means over prompts, to first order.

    Attributes:
        graph: whose components they are.
        nodes: [roles, writers] fp64.
        edges: [roles, writers, readers] fp64; None where they were not asked for.
        neurons: [roles, neurons] fp64 by block; empty where they were not asked for.
        roles: names of the roles of tokens.
        prompts: number that they are means over.
        facts: method, target, data, values of the target and the model, JSON-able.

    Raises:
        ConfigError: scores that do not fit the graph and the roles.

    Example:
        >>> scores = attribute(model, pairs, target)
        >>> scores.node_scores.shape, scores.edge_scores.shape  # [writers], [writers, readers]
        >>> heads, edges = scores.top_nodes(5), scores.top_edges(20)
    """

    graph: ComponentGraph
    nodes: Tensor
    edges: Tensor | None
    neurons: Mapping[int, Tensor]
    roles: tuple[str, ...]
    prompts: int
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles, writers, readers = len(self.roles), len(self.graph.writers), len(self.graph.readers)
        shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [("nodes", self.nodes, (roles, writers))]
        if self.edges is not None:
            shapes.append(("edges", self.edges, (roles, writers, readers)))
        for layer, scores in self.neurons.items():
            if not 0 <= layer < len(self.graph.layers):
                raise _no_such_block(layer, len(self.graph.layers))
            shapes.append((f"neurons of block {layer}", scores, (roles, scores.shape[-1])))
        for name, tensor, shape in shapes:
            if tuple(tensor.shape) != shape:
                raise _wrong_shape(name, shape, tensor)
        whole_number(self.prompts, "the number of prompts of scores", least=1)

    def __repr__(self) -> str:
        what = f"{self.nodes.shape[-1]} nodes" + ("" if self.edges is None else f", {self.graph.n_edges} edges")
        return f"ComponentScores({what}, {self.prompts} prompts, {self.facts.get('method', '')})"

    def __getitem__(self, name: str) -> float:
        """Score of a node `a3.h5` or an edge `a3.h5->m7`, over all roles. Raises ConfigError for one that there is not."""
        writer, arrow, reader = name.partition("->")
        if not arrow:
            return float(self.nodes[:, self.graph.writer_place(writer)].sum())
        places = self.graph.writer_place(writer), self.graph.reader_place(reader)
        if not self.graph.possible[places]:
            raise _no_edge(name)
        return float(self.edge_scores[places])

    @property
    def node_scores(self) -> Tensor:
        """[writers] over all roles."""
        return self.nodes.sum(0)

    @property
    def edge_scores(self) -> Tensor:
        """[writers, readers] over all roles. Raises ConfigError where there are none."""
        if self.edges is None:
            raise _no_edges()
        return self.edges.sum(0)

    def top_nodes(self, count: int, *, kinds: Sequence[str] = (HEAD,), absolute: bool = True) -> Circuit:
        """The circuit of the nodes with the highest scores.

        Args:
            kinds: some of `head`, `mlp`, `input`.
            absolute: by size; else only the highest, those that help the target.

        Raises:
            ConfigError: more than there are, all scores zero, or another kind. NonFiniteError: a score is NaN or infinite.
        """
        whole_number(count, "the number of nodes", least=1)
        for kind in kinds:
            one_of(kind, (HEAD, MLP, INPUT), "a kind of node")
        is_kind = torch.tensor([writer.kind in kinds for writer in self.graph.writers])
        chosen = _highest(self.node_scores, is_kind, count, absolute, "nodes")
        return Circuit(self.graph, chosen.double(), facts=self._chosen(nodes=count, absolute=absolute))

    def top_neurons(self, count: int, *, absolute: bool = True) -> Circuit:
        """The circuit of the neurons with the highest scores. Raises ConfigError as `top_nodes`, or without scores of neurons."""
        whole_number(count, "the number of neurons", least=1)
        if not self.neurons:
            raise _no_neurons()
        sizes = [len(scores[0]) for scores in self.neurons.values()]
        flat = torch.cat([scores.sum(0) for scores in self.neurons.values()])
        chosen = _highest(flat, torch.ones(len(flat), dtype=torch.bool), count, absolute, "neurons").double().split(sizes)
        neurons = {layer: amounts for layer, amounts in zip(self.neurons, chosen, strict=True) if amounts.any()}
        none = torch.zeros(len(self.graph.writers), dtype=torch.float64)
        return Circuit(self.graph, none, neurons=neurons, facts=self._chosen(neurons=count, absolute=absolute))

    def top_edges(self, count: int, *, absolute: bool = True) -> Circuit:
        """The circuit of the edges with the highest scores, without those that lead nowhere. Raises ConfigError as `top_nodes`."""
        whole_number(count, "the number of edges", least=1)
        chosen = _highest(self.edge_scores.flatten(), self.graph.possible.flatten(), count, absolute, "edges")
        kept = self.graph.pruned(chosen.view_as(self.graph.possible))
        nodes = kept.any(1).double()
        return Circuit(self.graph, nodes, edges=kept, facts=self._chosen(edges=count, absolute=absolute))

    def drawing(self, edges: int = 60) -> Graph:
        """The strongest edges as a graph to draw: components with their scores, and the target.

        An edge into keys or values of a group that several heads share goes to that of them with the highest score.
        """
        kept = self.top_edges(edges).edges
        assert kept is not None
        return _drawing(self, kept)

    def _chosen(self, **how: Any) -> dict[str, Any]:
        return {**self.facts, "chosen": how}

    # ---- means over more data and processes

    def joined(self, other: ComponentScores) -> ComponentScores:
        """The means over the prompts of both. Raises WrongModelError where they are scores of something else."""
        return _mean_of(self, [self._outline, other._outline], lambda of: of(self) + of(other))

    def all_reduced(self, group: dist.ProcessGroup | None = None) -> ComponentScores:
        """The means over the prompts of all processes of a group, each of which calls this; these scores where there is one process.

        Raises:
            WrongModelError: in every process, where they are scores of something else.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        outlines: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(outlines, self._outline, group=group)
        on = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")

        def total(of: Callable[[ComponentScores], Tensor]) -> Tensor:
            sums = of(self)
            reduced = sums.to(on)
            dist.all_reduce(reduced, group=group)
            return reduced.to(sums.device)

        return _mean_of(self, outlines, total)

    @property
    def _outline(self) -> _Outline:
        neurons = tuple((layer, scores.shape[-1]) for layer, scores in self.neurons.items())
        kind = (self.graph, self.roles, self.edges is not None, neurons)
        return _Outline(repr(self), kind, self.prompts, self.facts)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically."""
        tensors = {"nodes": self.nodes, **({} if self.edges is None else {"edges": self.edges})}
        tensors |= {f"neurons.{layer}": scores for layer, scores in self.neurons.items()}
        manifest = {"layers": self.graph.as_facts(), "roles": list(self.roles), "prompts": self.prompts, "facts": self.facts}
        return files.save_artifact(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, "scores of components"):
            check_kinds(manifest, {"layers": list, "roles": list, "prompts": int, "facts": dict})
            neurons = {int(name.partition(".")[2]): tensor for name, tensor in tensors.items() if name.startswith("neurons.")}
            graph = ComponentGraph.from_facts(manifest["layers"])
            roles = tuple(manifest["roles"])
            return cls(graph, tensors["nodes"], tensors.get("edges"), neurons, roles, manifest["prompts"], manifest["facts"])

    def export_mib(self, path: str | Path, circuit: Circuit | None = None, *, sign: str = "helps") -> Path:
        """Writes a file of EAP-IG and MIB, `.json` or `.pt`: scores over all roles of nodes and edges, and what is in a circuit.

        The form has no roles and no neurons of MLPs, which stay behind. A key-value group's score goes to its heads in equal shares.

        Args:
            sign: `helps`, as here: positive where the target is higher with it, for MIB, and EAP-IG with loss=True; `corruption_raises`,
                EAP-IG with a metric that returns the target: positive where the corrupted value raises it.

        Raises:
            ConfigError: what the form cannot say. WrongModelError: the circuit of another graph.
        """
        if circuit is None:
            circuit = Circuit(self.graph, torch.zeros_like(self.node_scores))
        if circuit.graph != self.graph:
            raise _other_circuit(self, circuit)
        circuit.check_whole("a circuit file of EAP-IG or MIB")
        shape, chosen = mib_shape(self.graph, self.facts), chosen_in_mib(circuit.graph, circuit.nodes, circuit.edges, circuit.n_neurons)
        edges = None if self.edges is None else self.edge_scores
        return write_scores(path, shape, self.graph, (self.node_scores, edges), chosen, sign)

    @classmethod
    def import_mib(cls, path: str | Path, model: nn.Module, *, sign: str) -> Self:
        """The scores of a file of EAP-IG or MIB, which count as those of one prompt.

        Keys and values of heads that share a group are added up, which is exact for scores that are linear in the gradient (EAP, EAP-IG).

        Args:
            sign: of the file, which does not say it: see `export_mib`.

        Raises:
            WrongModelError: the file of a model of another shape. ConfigError: another sign, or nodes without a score.
            Those of `steer.circuits.mib.read_mib`.
        """
        found = read_for_model(path, model, sign)
        edges = None if found.edge_scores is None else found.edge_scores[None]
        facts = {**found.facts, "imported": {**found.facts["imported"], "sign": sign}, "sign": "positive: the target is higher with it"}
        return cls(found.graph, found.node_scores[None], edges, {}, ("",), 1, facts)


@dataclass(frozen=True)
class _Outline:
    """What has to agree before scores are added up, and what is added up beside them.

    Attributes:
        kind: graph, roles, whether there are edges, and the sizes of neurons.
    """

    name: str
    kind: tuple[Any, ...]
    prompts: int
    facts: Mapping[str, Any]


def _mean_of(
    own: ComponentScores, outlines: Sequence[_Outline], total: Callable[[Callable[[ComponentScores], Tensor]], Tensor]
) -> ComponentScores:
    """Means over the prompts of several. total: adds up tensors of all of them."""
    for outline in outlines[1:]:
        if outline.kind != outlines[0].kind:
            raise _other_scores(outlines[0], outline)
    prompts = sum(outline.prompts for outline in outlines)

    def mean(of: Callable[[ComponentScores], Any]) -> Tensor:
        return total(lambda scores: of(scores).double() * scores.prompts) / prompts

    return replace(
        own,
        nodes=mean(lambda scores: scores.nodes),
        edges=None if own.edges is None else mean(lambda scores: scores.edges),
        neurons={layer: mean(partial(_neurons_of, layer)) for layer in own.neurons},
        prompts=prompts,
        facts=_facts_of_all(outlines),
    )


def _neurons_of(layer: int, scores: ComponentScores) -> Tensor:
    return scores.neurons[layer]


def _facts_of_all(outlines: Sequence[_Outline]) -> dict[str, Any]:
    """Those of the first, with mean values of the target, and one hash and the windows of all pairs."""
    facts, total = dict(outlines[0].facts), sum(outline.prompts for outline in outlines)
    for name in ("value", "corrupted_value"):
        if all(isinstance(outline.facts.get(name), float) for outline in outlines):
            facts[name] = sum(outline.facts[name] * outline.prompts for outline in outlines) / total
    for name in ("pairs", "texts"):
        if all(isinstance(outline.facts.get(name), dict) for outline in outlines):
            hashes = "\n".join(str(outline.facts[name].get("hash")) for outline in outlines)
            windows = sorted({window for outline in outlines for window in outline.facts[name].get("windows", ())})
            facts[name] = {"count": total, "hash": hashlib.sha256(hashes.encode()).hexdigest(), "windows": windows}
    return facts


def _drawing(scores: ComponentScores, kept: Tensor) -> Graph:
    """The graph of chosen edges. kept: [writers, readers] bool."""
    of_writers, weights = scores.node_scores, scores.edge_scores
    sizes = of_writers.abs()
    joined: dict[tuple[int, int], float] = {}
    target = len(scores.graph.writers)
    for writer, reader in kept.nonzero().tolist():
        uses = scores.graph.reads_for[reader].nonzero().flatten()
        receiver = target if not len(uses) else int(uses[sizes[uses].argmax()])
        joined[(writer, receiver)] = joined.get((writer, receiver), 0.0) + float(weights[writer, reader])
    places = sorted({place for ends in joined for place in ends})
    nodes = [Node(TARGET) if place == target else _drawn(scores.graph.writers[place]) for place in places]
    number = {place: i for i, place in enumerate(places)}
    ends = torch.tensor([[number[a], number[b]] for a, b in joined], dtype=torch.long).view(-1, 2)
    of_nodes = torch.tensor([0.0 if place == target else float(of_writers[place]) for place in places])
    return Graph(tuple(nodes), of_nodes, ends, torch.tensor(list(joined.values())), dict(scores.facts))


def _drawn(writer: Writer) -> Node:
    site = "embed" if writer.layer is None else f"layers.{writer.layer}.{'mlp.output' if writer.kind == MLP else 'attn.z'}"
    return Node(COMPONENT, site, writer.name)


def check_order(scores: Tensor, what: str) -> None:
    """Raises NonFiniteError, or ConfigError where all are zero: by such scores none is higher than another."""
    if not bool(torch.isfinite(scores).all()):
        raise _no_order(what)
    if not bool(scores.any()):
        raise _all_zero(what)


def _highest(scores: Tensor, allowed: Tensor, count: int, absolute: bool, what: str) -> Tensor:
    """[scores] bool, the highest of those allowed."""
    found = int(allowed.sum())
    if count > found:
        raise _too_many(what, count, found)
    check_order(scores[allowed], what)
    sizes = (scores.abs() if absolute else scores).masked_fill(~allowed, -torch.inf)
    chosen = torch.zeros_like(allowed)
    chosen[sizes.topk(count).indices] = True
    return chosen if absolute else chosen & (scores > 0)


# ---- errors


def _wrong_shape(name: str, shape: tuple[int, ...], found: Tensor) -> ConfigError:
    return ConfigError(f"`{name}` of scores do not fit their graph and roles", expected=list(shape), found=list(found.shape),
                       remedy="make them with `attribute` on one model")  # fmt: skip


def _no_such_block(layer: int, count: int) -> ConfigError:
    return ConfigError("scores of neurons are of a block that the graph does not have", expected=f"0 to {count - 1}", found=layer,
                       remedy="make them with `attribute` on one model")  # fmt: skip


def _no_edge(name: str) -> ConfigError:
    return ConfigError(f"there is no edge '{name}'", expected="a writer that comes before the reader", found=name,
                       remedy="turn it round, or take a later reader")  # fmt: skip


def _no_edges() -> ConfigError:
    return ConfigError("these scores have no edges", expected="scores of edges", found="scores of nodes alone",
                       remedy="attribute with edges=True")  # fmt: skip


def _no_neurons() -> ConfigError:
    return ConfigError("these scores have no neurons", expected="scores of neurons", found="scores of nodes alone",
                       remedy="attribute with neurons=True")  # fmt: skip


def _too_many(what: str, count: int, found: int) -> ConfigError:
    return ConfigError(f"more {what} were asked for than there are", expected=f"at most {found}", found=count, remedy="ask for fewer")


def _no_order(what: str) -> NonFiniteError:
    return NonFiniteError(f"scores of {what} are not finite, so that none is higher than another", expected="finite scores",
                          found="NaN or infinity", remedy="attribute in float32 or bfloat16, or leave these out")  # fmt: skip


def _all_zero(what: str) -> ConfigError:
    return ConfigError(
        f"all scores of {what} are zero, so that none is higher than another",
        expected="a target that depends on them",
        found="zeros",
        remedy="clean and corrupted prompts may be the same, or the target may not look at what differs",
    )


def _other_scores(a: _Outline, b: _Outline) -> WrongModelError:
    return WrongModelError("scores of different models or kinds cannot be joined", expected=a.name, found=b.name,
                           remedy="attribute both with the same model and arguments")  # fmt: skip


def _other_circuit(scores: ComponentScores, circuit: Circuit) -> WrongModelError:
    return WrongModelError("the circuit is not one of the model that was scored", expected=repr(scores), found=repr(circuit),
                           remedy="choose it by these scores, or import both with the same model")  # fmt: skip
