"""Runs of prompts with components or edges taken out: the target of each prompt when a circuit, or all but the circuit, is ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from steer.circuits.ablation import RESAMPLE, Ablation
from steer.circuits.circuit import Circuit
from steer.circuits.component_pass import values_at, written_sites
from steer.circuits.components import HEAD, INPUT, MLP, ComponentGraph
from steer.circuits.edge_ablation import EdgeAblation, Replacement, SiteFunction
from steer.circuits.edge_attachment import check_no_edges_ablated
from steer.circuits.pairs import Pairs
from steer.circuits.stream_readers import stream_readers
from steer.circuits.targets import Target
from steer.circuits.text_passes import TextPasses, warn_of_plan
from steer.circuits.texts import NO_ROLE, Batch, Prompts, Texts, rows_of
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site

CHANGE_BYTES = 2**29  # of what cut writers change in one batch
NEURON = "neuron"


@dataclass(frozen=True, eq=False)
class TakenOut:
    """What is ablated in a run.

    Attributes:
        nodes: [writers] fp64 amounts, 1 where all of a component is ablated. neurons: [neurons] likewise, by block.
        edges: [writers, readers] bool; None for no edge.

    All of them may have rows before, [rows, writers] and so on, where each row of a batch loses something else.

    Example:
        >>> run = ComponentRun(model, pairs, target, resample_ablation())
        >>> run.values([TakenOut.circuit(circuit), TakenOut.all_but(circuit)])  # [2, prompts]
    """

    nodes: Tensor
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    edges: Tensor | None = None

    @classmethod
    def nothing(cls, graph: ComponentGraph) -> Self:
        """The model as it is."""
        return cls(torch.zeros(len(graph.writers), dtype=torch.float64))

    @classmethod
    def by_row(cls, rows: Sequence[TakenOut], times: int = 1) -> TakenOut:
        """For each row of a batch something else, nodes and edges; each of them for `times` rows one after the other."""
        edges = None
        if any(row.edges is not None for row in rows):
            none = next(torch.zeros_like(row.edges) for row in rows if row.edges is not None)
            edges = torch.stack([none if row.edges is None else row.edges for row in rows]).repeat_interleave(times, 0)
        return cls(torch.stack([row.nodes for row in rows]).repeat_interleave(times, 0), {}, edges)

    @classmethod
    def circuit(cls, circuit: Circuit) -> Self:
        """Its own components; its edges where it has edges."""
        if circuit.edges is not None:
            return cls(torch.zeros_like(circuit.nodes), {}, circuit.edges & circuit.graph.possible)
        circuit.check_whole("taking components out exactly")
        return cls(circuit.nodes, circuit.neurons)

    @classmethod
    def all_but(cls, circuit: Circuit, kinds: Sequence[str] | None = None) -> Self:
        """All other components of the kinds that it has; all other edges where it has edges.

        Args:
            kinds: some of `head`, `mlp`, `input`, `neuron`; None for those of its components.
        """
        if circuit.edges is not None:
            return cls(torch.zeros_like(circuit.nodes), {}, circuit.graph.possible & ~circuit.edges)
        circuit.check_whole("taking components out exactly")
        chosen = kinds_of(circuit) if kinds is None else kinds
        is_kind = torch.tensor([writer.kind in chosen for writer in circuit.graph.writers])
        neurons = {layer: 1 - amounts for layer, amounts in circuit.neurons.items()} if NEURON in chosen else {}
        return cls(torch.where(is_kind, 1 - circuit.nodes, 0), neurons)


def kinds_of(circuit: Circuit) -> tuple[str, ...]:
    """Kinds of the components of a circuit of nodes: some of `head`, `mlp`, `input`, `neuron`."""
    of_nodes = {writer.kind for writer, amount in zip(circuit.graph.writers, circuit.nodes.tolist(), strict=True) if amount}
    return tuple(kind for kind in (HEAD, MLP, INPUT) if kind in of_nodes) + ((NEURON,) if circuit.neurons else ())


class ComponentRun:
    """Runs prompts with components taken out.

    A token without a role keeps all its components, see `Texts`.

    Args:
        prompts: pairs, or prompts alone where the ablation needs no counterfactual.
        target: a number of the logits of each prompt.
        ablation: what takes the place of components.
        max_tokens: padded tokens of a batch; fewer where edges of many writers are cut.

    Raises:
        ConfigError: a resample ablation without pairs, or means of fewer positions than the prompts have. AttachError: of `values` with
            edges, where edges of the model are ablated already.

    Example:
        >>> run = ComponentRun(model, pairs, target, resample_ablation())
        >>> without = run.values([TakenOut.circuit(circuit)])  # [1, prompts]
    """

    def __init__(
        self, model: nn.Module, prompts: Pairs | Texts | Prompts, target: Target, ablation: Ablation, *, max_tokens: int = 512
    ) -> None:
        self.anatomy = Anatomy.find(model)
        texts = texts_of(model, prompts)
        if ablation.kind == RESAMPLE and not isinstance(prompts, Pairs):
            raise _no_pairs()
        ablation.check_model(self.anatomy)
        if ablation.per_position:
            _check_positions(ablation, max(texts.lengths))
        self.target, self.ablation, self.max_tokens = target, ablation, max_tokens
        self.passes = TextPasses(model, self.anatomy, texts, max_tokens=max_tokens)
        self.counterfactuals: TextPasses | None = None
        if ablation.kind == RESAMPLE and isinstance(prompts, Pairs):
            self.counterfactuals = TextPasses(model, self.anatomy, prompts.corrupted, max_tokens=max_tokens)
        self.blocks = stream_readers(model, self.anatomy)
        self.graph = ComponentGraph.of(self.anatomy, [block.parallel for block in self.blocks])

    def __len__(self) -> int:
        return len(self.passes.texts)

    @torch.no_grad()
    def values(self, taken_out: Sequence[TakenOut]) -> Tensor:
        """[runs, prompts] fp64 of the target, each with something else taken out."""
        warn_of_plan(self.passes.model, "values are those of")
        found = torch.zeros(len(taken_out), len(self), dtype=torch.float64)
        for prompts in self.batches(taken_out):
            batch = self.passes.batch(prompts)
            replacement = self.replacement(batch, self.counterfactual(prompts, neurons=any(each.neurons for each in taken_out)))
            for number, each in enumerate(taken_out):
                found[number, prompts] = self._run(batch, each, replacement).double().cpu()
        return found

    def batches(self, taken_out: Sequence[TakenOut]) -> list[list[int]]:
        """Prompts of each batch, small enough for the changes of all writers that lose an edge."""
        writers = max((int(each.edges.any(1).sum()) for each in taken_out if each.edges is not None), default=0)
        fits = CHANGE_BYTES // (4 * writers * self.anatomy.width) if writers else self.max_tokens
        self.passes.max_tokens = max(1, min(self.max_tokens, fits))
        return list(self.passes.batches(range(len(self))))

    def _run(self, batch: Batch, taken_out: TakenOut, replacement: Replacement) -> Tensor:
        """[rows] of the target."""
        functions = self.functions(taken_out, replacement)
        last = bool(getattr(self.target, "at_last_token", False))
        logits = self.passes.run_batch(batch, functions, gradients=torch.is_grad_enabled(), last_token=last)
        assert logits is not None
        return self.passes.values(self.target, batch, logits)

    def functions(self, taken_out: TakenOut, replacement: Replacement) -> dict[Site, HookFunction]:
        """By site. Nodes are ablated before edges look at what they write."""
        amounts = self._amounts(taken_out)
        found: dict[Site, HookFunction] = {site: SiteFunction(_ablated(site, amount, replacement)) for site, amount in amounts.items()}
        if taken_out.edges is None or not bool(taken_out.edges.any()):
            return found
        check_no_edges_ablated(self.anatomy)
        for site, function in EdgeAblation(self.anatomy, self.graph, self.blocks, taken_out.edges, replacement).functions().items():
            found[site] = SiteFunction(_both(found[site], function)) if site in found else function
        return dict(sorted(found.items(), key=lambda item: item[0].order))

    def replaced(self, taken_out: TakenOut) -> dict[Site, int]:
        """Width of each site of which something is taken out, nodes or what edges carry."""
        sites = dict.fromkeys(self._amounts(taken_out))
        if taken_out.edges is not None:
            loses = taken_out.edges.any(1).double()
            sites |= dict.fromkeys(self._amounts(TakenOut(loses)))
        return {site: self.anatomy.point(site).width or self.anatomy.width for site in sites}

    def _amounts(self, taken_out: TakenOut) -> dict[Site, Tensor]:
        """[width], or [rows, 1, width], of the sites where something is."""
        nodes = taken_out.nodes.float()
        nodes = nodes.unsqueeze(1) if nodes.dim() == 2 else nodes
        found = {Site("embed"): nodes[..., :1]}
        for layer in range(self.anatomy.n_layers):
            heads = nodes[..., self.graph.heads_at(layer)]
            found[Site("attn.z", layer)] = heads.repeat_interleave(heads_of(self.anatomy, layer).head_dim, -1)
            if layer in taken_out.neurons:
                found[Site("mlp.neurons", layer)] = taken_out.neurons[layer].float()
            mlp = self.graph.mlp_at(layer)
            found[Site("mlp.output", layer)] = nodes[..., mlp : mlp + 1]
        return {site: amount for site, amount in found.items() if bool(amount.any())}

    # ---- what takes their place

    def replacement(self, batch: Batch, values: Mapping[Site, Tensor]) -> Replacement:
        """What takes the place of components in the rows of a batch. values: [rows, tokens, width] of the counterfactuals."""
        leaves = bool(((batch.roles == NO_ROLE) & batch.mask.bool()).any())  # some tokens keep all of their components
        at = (batch.roles != NO_ROLE).unsqueeze(-1)

        def replacement(site: Site, h: Tensor) -> Tensor:
            new = values[site].to(h) if self.counterfactuals is not None else constant_at(self.ablation, site, h, batch.positions)
            return torch.where(at.to(h.device), new, h) if leaves else new

        return replacement

    def counterfactual(self, prompts: Sequence[int], *, neurons: bool = False) -> dict[Site, Tensor]:
        """[rows, tokens, width] by site, what is written on the counterfactuals of prompts; empty where constants take its place."""
        if self.counterfactuals is None:
            return {}
        sites = written_sites(self.anatomy.n_layers, neurons=neurons)
        return values_at(self.counterfactuals, self.counterfactuals.batch(prompts), sites)


def texts_of(model: nn.Module, prompts: Pairs | Texts | Prompts) -> Texts:
    """The clean ones of pairs."""
    if isinstance(prompts, Pairs):
        return prompts.clean
    return prompts if isinstance(prompts, Texts) else Texts(rows_of(model, prompts))


def constant_at(ablation: Ablation, site: Site, h: Tensor, positions: Tensor | None = None) -> Tensor:
    """[width] or [rows, tokens, width], what takes the place of an activation. positions: [rows, tokens], for means per position."""
    value = ablation.values.get(site)
    if value is not None and value.dim() == 2:
        assert positions is not None
        return value.to(h)[positions.to(h.device)]
    return ablation.constants()(site, h.shape[-1]).to(h)


def _ablated(site: Site, amount: Tensor, replacement: Replacement) -> HookFunction:
    def function(h: Tensor, context: ForwardContext) -> Tensor:
        return torch.lerp(h, replacement(site, h).expand_as(h), amount.to(h).expand_as(h))

    return function


def _both(first: HookFunction, second: HookFunction) -> HookFunction:
    def function(h: Tensor, context: ForwardContext) -> Tensor | None:
        edited = first(h, context)
        assert edited is not None
        again = second(edited, context)
        return edited if again is None else again

    return function


def _check_positions(ablation: Ablation, longest: int) -> None:
    known = min(len(value) for value in ablation.values.values() if value.dim() == 2)
    if longest > known:
        raise _too_few_positions(known, longest)


# ---- errors


def _no_pairs() -> ConfigError:
    return ConfigError("resample ablation takes what components write on the counterfactual prompt", expected="pairs of prompts",
                       found="prompts alone", remedy="make them with Pairs.of(model, clean, corrupted)")  # fmt: skip


def _too_few_positions(known: int, longest: int) -> ConfigError:
    return ConfigError("a mean per position does not reach to the end of the prompts", expected=f"prompts of at most {known} tokens",
                       found=longest, remedy="take the means of prompts of this template, or leave out per_position")  # fmt: skip
