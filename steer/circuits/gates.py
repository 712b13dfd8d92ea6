"""Gates of candidates: one parameter for each head, MLP or neuron that mask learning may put into a circuit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.circuits.ablation import Ablation
from steer.circuits.circuit import Circuit
from steer.circuits.components import HEAD, INPUT, MLP
from steer.circuits.operators.gate_components import GateComponents, gates_of
from steer.errors import ConfigError
from steer.intervene import Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.site import Site

NEURON = "neuron"
KINDS = (INPUT, HEAD, MLP, NEURON)


@dataclass(frozen=True, eq=False)
class GatedSite:
    """Candidates at one site.

    Attributes:
        kind: `input`, `head`, `mlp` or `neuron`.
        places: [candidates] among the writers of the graph, or among the neurons of the block.
        ablating, alone: what takes the candidates out by their amounts, and what takes out the rest of them; they share their gates.
    """

    site: Site
    kind: str
    places: Tensor
    ablating: GateComponents
    alone: GateComponents


class CandidateGates:
    """One gate for each component of a circuit of candidates, the same for all channels of a head.

    Args:
        anatomy: of the model. candidates: the components that may be chosen. ablation: what takes the place of those that are.
        form: of the gates, see `GateComponents`. start: amount of each at first.

    Raises:
        ConfigError: no candidates, or an ablation towards another prompt.
    """

    def __init__(self, anatomy: Anatomy, candidates: Circuit, ablation: Ablation, *, form: str, start: float) -> None:
        if candidates.is_empty:
            raise _no_candidates()
        candidates.check_whole("mask learning")
        self.candidates, self.ablation = candidates, ablation
        constants = ablation.constants()
        self.sites = []
        for site, kind, places, component in _numbered(anatomy, candidates):
            gates = nn.Parameter(gates_of(torch.full((1, len(places)), start), form))
            constant = constants(site, len(component))
            operators = [GateComponents(gates.detach(), component, constant, form, alone) for alone in (False, True)]
            for operator in operators:
                operator.tensors["gates"] = gates
            self.sites.append(GatedSite(site, kind, places, *operators))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """By site, [1, candidates] each."""
        return [parameter for each in self.sites for parameter in each.ablating.parameters.values()]

    def plan(self, *, alone: bool = False) -> Plan:
        """The plan that ablates candidates by their amounts. alone: that leaves the circuit and ablates the other candidates."""
        return Plan([Intervention(each.alone if alone else each.ablating, each.site, name=_name(each.site)) for each in self.sites])

    def penalty(self, weights: dict[str, float]) -> Tensor:
        """Sum of the sizes of all gates, weighted by the kind of their component; a scalar on the CPU."""
        parts = [weights[each.kind] * each.ablating.sizes().sum().cpu() for each in self.sites]
        return torch.stack(parts).sum()

    def cut_off(self) -> None:
        """See `GateComponents.cut_off`."""
        for each in self.sites:
            each.ablating.cut_off()

    @torch.no_grad()
    def circuit(self, least: float) -> Circuit:
        """The circuit of the amounts as they are. least: smaller ones are 0."""
        nodes = torch.zeros(len(self.candidates.graph.writers), dtype=torch.float64)
        neurons: dict[int, Tensor] = {}
        for each in self.sites:
            amounts = each.ablating.amounts()[0].double().cpu()
            amounts = torch.where(amounts >= least, amounts, 0.0)
            if each.kind != NEURON:
                nodes[each.places] = amounts
            elif bool(amounts.any()):
                layer = each.site.layer or 0
                neurons[layer] = torch.zeros_like(self.candidates.neurons[layer])
                neurons[layer][each.places] = amounts
        return Circuit(self.candidates.graph, nodes, neurons=neurons, ablation=self.ablation)


def _numbered(anatomy: Anatomy, candidates: Circuit) -> Iterator[tuple[Site, str, Tensor, Tensor]]:
    """Site, kind, places [candidates] and component [width], as `GateComponents` numbers them, in the order of a pass."""
    graph, nodes = candidates.graph, candidates.nodes != 0

    def whole(site: Site, kind: str, place: int) -> tuple[Site, str, Tensor, Tensor]:
        return site, kind, torch.tensor([place]), torch.ones(anatomy.width)

    if nodes[0]:
        yield whole(Site("embed"), INPUT, 0)
    for layer in range(anatomy.n_layers):
        heads = graph.heads_at(layer)
        if nodes[heads].any():
            number = torch.where(nodes[heads], nodes[heads].cumsum(0), 0)  # [heads]
            component = number.repeat_interleave(heads_of(anatomy, layer).head_dim)
            yield Site("attn.z", layer), HEAD, heads.start + nodes[heads].nonzero()[:, 0], component
        neurons = candidates.neurons.get(layer)
        if neurons is not None and bool(neurons.any()):
            is_in = neurons != 0
            yield Site("mlp.neurons", layer), NEURON, is_in.nonzero()[:, 0], torch.where(is_in, is_in.cumsum(0), 0)
        if nodes[graph.mlp_at(layer)]:
            yield whole(Site("mlp.output", layer), MLP, graph.mlp_at(layer))


def _name(site: Site) -> str:
    return f"gates_{site}".replace(".", "_")


# ---- errors


def _no_candidates() -> ConfigError:
    return ConfigError("there is nothing to learn gates of", expected="a circuit of candidates with at least one node or neuron",
                       found="an empty one", remedy="e.g. scores.top_nodes(40)")  # fmt: skip
