"""Circuit: chosen components of a model, or edges between them, with what takes their place when they are ablated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from steer import files
from steer.checks import of_type
from steer.circuits.ablation import Ablation
from steer.circuits.components import HEAD, INPUT, MLP, ComponentGraph
from steer.circuits.edge_attachment import EdgesAblated
from steer.circuits.head_parts import check_parts, draw_parts, in_part, not_whole, parts_beside_edges, parts_by_block
from steer.circuits.mib_exchange import chosen_in_mib, mib_shape, no_circuit_in, read_for_model, write_scores
from steer.circuits.operators.ablate_components import AblateComponents
from steer.circuits.stream_readers import stream_readers
from steer.errors import ConfigError, NonFiniteError, WrongModelError
from steer.intervene import Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.context import PHASES
from steer.model.fingerprint import differing, warn_of_cast
from steer.model.site import Site
from steer.reading import check_kinds, damage_of

KIND = "component circuit"


@dataclass(frozen=True, eq=False)
class Circuit:
    """Components of a model, each with an amount: 0 where it is not in the circuit, 1 where all of it is, between for a learned gate.

    Attributes:
        graph: of the model.
        nodes: [writers] fp64 amounts of the embedding, heads and MLPs.
        edges: [writers, readers] bool; None for a circuit of nodes.
        neurons: [neurons] fp64 amounts by block.
        parts: [rank, head_dim] orthonormal rows by the name of a head in the circuit, of which only these directions are in it.
        ablation: what takes the place of a component; None until `with_ablation`.
        facts: how it was found: method, target, data, sign, model. JSON-able.

    Raises:
        ConfigError: masks of another shape than the graph, or both edges and parts of heads. NonFiniteError: amounts that are not finite.

    Example:
        >>> scores = attribute(model, pairs, target)
        >>> circuit = scores.top_nodes(5).with_ablation(mean_ablation(model, texts))
        >>> with circuit.ablation_plan(model).attached(model):
        ...     model.generate(**prompt, max_new_tokens=2)
    """

    graph: ComponentGraph
    nodes: Tensor
    edges: Tensor | None = None
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    ablation: Ablation | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {"nodes": (len(self.graph.writers),), "edges": (len(self.graph.writers), len(self.graph.readers))}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise _wrong_shape(name, shape, tensor)
        check_parts(self.graph, self.nodes, self.parts)
        if self.parts and self.edges is not None:
            raise parts_beside_edges()
        if self.edges is not None and self.edges.dtype != torch.bool:
            raise _no_mask(self.edges)
        for layer, amounts in self.neurons.items():
            if not 0 <= layer < len(self.graph.layers) or amounts.dim() != 1:
                raise _wrong_neurons(layer, amounts, len(self.graph.layers))
        for name, amounts in (("nodes", self.nodes), *((f"neurons of block {layer}", each) for layer, each in self.neurons.items())):
            if not bool(torch.isfinite(amounts).all()):
                raise _not_finite(name)

    @classmethod
    def of_nodes(cls, model: nn.Module, names: Sequence[str], **facts: Any) -> Self:
        """The circuit of nodes by name, `a3.h5`, `m7`, `input`. Raises ConfigError for none, or one that the model does not have."""
        anatomy = Anatomy.find(model)
        graph = ComponentGraph.of(anatomy, [block.parallel for block in stream_readers(model, anatomy)])
        of_type(names, (list, tuple), "the nodes of a circuit", "pass a list of names, e.g. ['a3.h5', 'm7']")
        if not names:
            raise _empty()
        nodes = torch.zeros(len(graph.writers), dtype=torch.float64)
        for name in names:
            nodes[graph.writer_place(name)] = 1
        return cls(graph, nodes, facts={"model": anatomy.fingerprint(), **facts})

    def __repr__(self) -> str:
        parts = [f"{len(self.node_names)} nodes"]
        parts += [] if self.edges is None else [f"{int(self.edges.sum())} edges"]
        parts += [f"{self.n_neurons} neurons"] if self.neurons else []
        parts += [f"{len(self.parts)} heads in part"] if self.parts else []
        return f"Circuit({', '.join(parts)}{'' if self.ablation is None else f', {self.ablation.kind} ablation'})"

    @property
    def node_names(self) -> list[str]:
        """Of the nodes in it."""
        return [writer.name for writer, amount in zip(self.graph.writers, self.nodes.tolist(), strict=True) if amount]

    @property
    def n_neurons(self) -> int:
        return sum(int((amounts != 0).sum()) for amounts in self.neurons.values())

    @property
    def is_empty(self) -> bool:
        return not bool(self.nodes.any()) and not self.n_neurons

    def with_ablation(self, ablation: Ablation) -> Self:
        """The same with what takes the place of its components."""
        of_type(ablation, Ablation, "the ablation of a circuit", "e.g. zero_ablation(), or mean_ablation(model, texts)")
        return replace(self, ablation=ablation)

    def random(self, seed: int) -> Self:
        """As many components of each kind with the same amounts, and as many edges, drawn from those that are not in it: the control."""
        generator = torch.Generator().manual_seed(seed)
        nodes, is_whole = torch.zeros_like(self.nodes), ~in_part(self.graph, self.parts)
        for kind in (INPUT, HEAD, MLP):  # of the input there is one alone, which stays
            is_kind = torch.tensor([writer.kind == kind for writer in self.graph.writers])
            _draw(nodes, self.nodes, is_kind & is_whole, generator)
        parts = draw_parts(self.graph, self.nodes, self.parts, nodes, generator)
        neurons: dict[int, Tensor] = {}
        for layer, amounts in self.neurons.items():
            _draw(neurons.setdefault(layer, torch.zeros_like(amounts)), amounts, torch.ones_like(amounts, dtype=torch.bool), generator)
        edges = None if self.edges is None else torch.zeros_like(self.edges)
        if self.edges is not None and edges is not None:
            _draw(edges.view(-1), self.edges.view(-1), self.graph.possible.view(-1), generator)
        return replace(self, nodes=nodes, neurons=neurons, edges=edges, parts=parts, facts={**self.facts, "random": seed})

    # ---- use

    def check_model(self, model: nn.Module) -> Anatomy:
        """The anatomy of a model that it belongs to, or of a copy in another type, for which it warns.

        Raises:
            WrongModelError: other weights, or another shape; constants of the ablation that are those of other weights.
        """
        anatomy = Anatomy.find(model)
        known = self.facts.get("model")
        found = anatomy.fingerprint()
        if (known is not None and differing(known, found)) or self._shape != _shape_of(anatomy):
            raise _other_model(known or f"heads and key-value heads {self._shape}", found if known else _shape_of(anatomy))
        if known is not None:
            warn_of_cast("this circuit was", known, found)
        if self.ablation is not None:
            self.ablation.check_model(anatomy)
        return anatomy

    def check_whole(self, use: str) -> None:
        """Raises ConfigError where it has parts of heads, which `use` does not take."""
        if self.parts:
            raise not_whole(list(self.parts), use)

    @property
    def _shape(self) -> list[tuple[int, int]]:
        return [(layer.heads, layer.groups) for layer in self.graph.layers]

    def ablation_plan(self, model: nn.Module, strength: float = 1.0, *, scope: str = "all", phases: Sequence[str] = PHASES) -> Plan:
        """A plan that ablates the nodes and neurons of the circuit: h + strength * amount * (constant - h) at each site.

        Of a head in part the difference to the constant goes along the directions of its part alone.

        Args:
            strength: 0 leaves the model as it is, 1 ablates, above 1 goes past the constant.

        Raises:
            ConfigError: an empty circuit, no ablation, or one towards another prompt, which no text that is being written has.
            WrongModelError: the circuit of another model.
        """
        anatomy = self.check_model(model)
        if self.is_empty:
            raise _empty()
        if self.ablation is None:
            raise _no_ablation()
        if self.edges is not None:
            warnings.warn(
                "of a circuit of edges this plan ablates the nodes, all of their edges: edges_ablated cuts its own alone", stacklevel=2
            )
        constants = self.ablation.constants()
        edits = []
        whole = torch.where(in_part(self.graph, self.parts), 0, self.nodes)
        for site, amount in replace(self, nodes=whole, parts={}).amounts(anatomy).items():
            operator = AblateComponents(amount.float(), constants(site, len(amount)).float())
            edits.append(Intervention(operator, site, scope, strength, phases, name=f"{site}".replace(".", "_")))
        for parts in parts_by_block(anatomy, self.graph, self.nodes, self.parts):
            site = Site("attn.z", parts.layer)
            erase = parts.operator(constants(site, parts.rows.shape[1]))
            edits.append(Intervention(erase, site, scope, strength, phases, name=f"parts_{site}".replace(".", "_")))
        return Plan(edits, fingerprint=anatomy.fingerprint())

    def edges_ablated(self, model: nn.Module, strength: float = 1.0) -> EdgesAblated:
        """The edges of the circuit, cut in every pass of a model while attached, in generation and training: see `EdgesAblated`."""
        return EdgesAblated(self, model, strength)

    def amounts(self, anatomy: Anatomy) -> dict[Site, Tensor]:
        """[width] fp64 how much of each channel is in the circuit, at the sites where some is. Raises ConfigError for parts of heads."""
        self.check_whole("an amount of each channel")
        found: dict[Site, Tensor] = {}
        if self.nodes[0]:
            found[Site("embed")] = self.nodes[0].expand(anatomy.width)
        for layer in range(anatomy.n_layers):
            heads = self.nodes[self.graph.heads_at(layer)]
            found[Site("attn.z", layer)] = heads.repeat_interleave(heads_of(anatomy, layer).head_dim)
            if layer in self.neurons:
                found[Site("mlp.neurons", layer)] = self.neurons[layer]
            found[Site("mlp.output", layer)] = self.nodes[self.graph.mlp_at(layer)].expand(anatomy.width)
        return {site: amount for site, amount in found.items() if bool(amount.any())}

    # ---- files

    def file_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Manifest and tensors."""
        tensors = {"nodes": self.nodes, **({} if self.edges is None else {"edges": self.edges})}
        tensors |= {f"neurons.{layer}": amounts for layer, amounts in self.neurons.items()}
        tensors |= {f"parts.{name}": directions for name, directions in self.parts.items()}
        manifest: dict[str, Any] = {"layers": self.graph.as_facts(), "facts": self.facts, "ablation": None}
        if self.ablation is not None:
            manifest["ablation"], constants = self.ablation.file_form()
            tensors |= {f"ablation.{site}": tensor for site, tensor in constants.items()}
        return manifest, tensors

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically."""
        manifest, tensors = self.file_form()
        return files.save_artifact(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, "a circuit of components"):
            check_kinds(manifest, {"layers": list, "facts": dict, "ablation": (dict, type(None))})
            neurons = {int(name.partition(".")[2]): tensor for name, tensor in tensors.items() if name.startswith("neurons.")}
            constants = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("ablation.")}
            parts = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("parts.")}
            ablation = None if manifest["ablation"] is None else Ablation.from_file(manifest["ablation"], constants)
            graph = ComponentGraph.from_facts(manifest["layers"])
            return cls(graph, tensors["nodes"], tensors.get("edges"), neurons, ablation, manifest["facts"], parts)

    def export_mib(self, path: str | Path) -> Path:
        """Writes a circuit file of EAP-IG and MIB, `.json` or `.pt`; without the ablation, for which it has no place.

        What is in the circuit has the score 1 and all else 0; `ComponentScores.export_mib` writes the circuit with its scores.

        Raises:
            ConfigError: amounts other than 0 and 1, neurons, parts of heads, or blocks of different shape, which the form cannot say.
        """
        self.check_whole("a circuit file of EAP-IG or MIB")
        edges = self.nodes[:, None] * self.graph.possible if self.edges is None else self.edges.double()
        chosen = chosen_in_mib(self.graph, self.nodes, self.edges, self.n_neurons)
        return write_scores(path, mib_shape(self.graph, self.facts), self.graph, (chosen[0].double(), edges), chosen, "helps")

    @classmethod
    def import_mib(cls, path: str | Path, model: nn.Module) -> Self:
        """The circuit of a file of EAP-IG or MIB, `in_graph` of its edges; a circuit of nodes where all edges of its nodes are in it.

        An edge to some heads of a key-value group becomes one to the whole group, with a warning; `facts` list these.

        Raises:
            WrongModelError: the file of a model of another shape. ConfigError: nothing in the circuit, or only some channels of a node.
            Those of `steer.circuits.mib.read_mib`.
        """
        found = read_for_model(path, model, "helps")
        if not bool(found.nodes.any()):
            raise no_circuit_in(path)
        return cls(found.graph, found.nodes.double(), found.edges, facts=found.facts)


def _shape_of(anatomy: Anatomy) -> list[tuple[int, int]]:
    """Heads and key-value heads of each block."""
    of_blocks = [heads_of(anatomy, layer, "attn.q") for layer in range(anatomy.n_layers)]
    return [(heads.n_heads, heads.n_kv_heads) for heads in of_blocks]


def _draw(into: Tensor, given: Tensor, allowed: Tensor, generator: torch.Generator) -> None:
    """Gives the amounts of some entries to others of those allowed; to some of its own where too few others are left."""
    amounts = given[allowed & (given != 0)]
    others = (allowed & (given == 0)).nonzero().flatten()
    own = (allowed & (given != 0)).nonzero().flatten()
    order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in (others, own)])
    into[order[: len(amounts)]] = amounts


# ---- errors


def _wrong_shape(name: str, shape: tuple[int, ...], found: Tensor) -> ConfigError:
    return ConfigError(f"`{name}` of a circuit do not fit its graph", expected=list(shape), found=list(found.shape),
                       remedy="make it with the graph of the same model")  # fmt: skip


def _no_mask(found: Tensor) -> ConfigError:
    return ConfigError("`edges` of a circuit say of each whether it is in the circuit", expected="torch.bool", found=found.dtype,
                       remedy="e.g. scores.edge_scores > 0.1")  # fmt: skip


def _wrong_neurons(layer: int, found: Tensor, blocks: int) -> ConfigError:
    return ConfigError("`neurons` of a circuit do not fit its graph", expected=f"[neurons] by block, from 0 to {blocks - 1}",
                       found=f"{list(found.shape)} of block {layer}", remedy="make it with the graph of the same model")  # fmt: skip


def _not_finite(name: str) -> NonFiniteError:
    return NonFiniteError(f"amounts of the {name} of a circuit are not finite", expected="numbers from 0 to 1", found="NaN or infinity",
                          remedy="look at how they were computed")  # fmt: skip


def _empty() -> ConfigError:
    return ConfigError("the circuit is empty", expected="at least one node or neuron", found="none",
                       remedy="choose more components, or a lower threshold")  # fmt: skip


def _no_ablation() -> ConfigError:
    return ConfigError(
        "the circuit does not say what takes the place of its components",
        expected="an ablation",
        found="none",
        remedy="circuit.with_ablation(mean_ablation(model, texts)), or zero_ablation()",
    )


def _other_model(known: Any, found: Any) -> WrongModelError:
    return WrongModelError("the circuit is one of another model", expected=known, found=found,
                           remedy="attribute on this model, or load the one that the circuit was found in")  # fmt: skip
