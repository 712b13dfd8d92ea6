"""Circuits of tiny models with heads, neurons and a whole MLP, and what the tests of their uses share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steer.circuits import Ablation, Circuit
from steer.circuits.component_pass import written_sites
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row

HEAD = 2  # of block 1
NEURONS = [3, 10]  # of block 0


def circuit_of(model: nn.Module, *names: str, neurons: bool = True) -> Circuit:
    """Head 2 of block 1, neurons of block 0 and other nodes, with amounts between 0 and 1 and constants that are not 0."""
    circuit = Circuit.of_nodes(model, ["a1.h2", *names])
    anatomy = Anatomy.find(model)
    of_block: dict[int, Tensor] = {}
    if neurons:
        of_block[0] = torch.zeros(anatomy.point("layers.0.mlp.neurons").width or 0, dtype=torch.float64)
        of_block[0][NEURONS] = torch.tensor([1.0, 0.6], dtype=torch.float64)
    random = torch.Generator().manual_seed(4)
    sites = [site for site in written_sites(anatomy.n_layers, neurons=True) if site.layer is None or neurons or site.part != "mlp.neurons"]
    values = {site: 0.3 * torch.randn(anatomy.point(site).width or anatomy.width, generator=random) for site in sites}
    nodes = circuit.nodes * torch.linspace(1.0, 0.7, len(circuit.nodes), dtype=torch.float64)
    return Circuit(circuit.graph, nodes, neurons=of_block, ablation=Ablation("mean", values), facts=circuit.facts)


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(7, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), use_cache=False).logits


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, **options: bool) -> None:
    """Optimiser steps of two micro-batches each, with clipping."""
    batch = ids(4, 9)
    for _ in range(count):
        optimizer.zero_grad(**options)
        for part in batch.split(2):
            model(input_ids=part, labels=part, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()


def rows(count: int, length: int, seed: int = 0) -> list[Row]:
    random = torch.Generator().manual_seed(seed)
    return [Row(tuple(torch.randint(3, 96, (length,), generator=random).tolist()), 0) for _ in range(count)]
