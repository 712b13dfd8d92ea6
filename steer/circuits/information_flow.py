"""Information flow routes (Ferrando & Voita 2024, arXiv 2403.00824): how near what a reader reads is to what each writer wrote.

One forward pass on a text, without a gradient, a counterfactual or a target: it says where a stream comes from, not what it is good for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.circuits.component_pass import values_at, written_sites
from steer.circuits.component_scores import ComponentScores
from steer.circuits.component_weights import output_matrix
from steer.circuits.components import MLP, ComponentGraph
from steer.circuits.stream_readers import BlockReaders, stream_readers
from steer.circuits.text_overlap import window_hashes
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Positions, Prompts, Texts, rows_of
from steer.model.anatomy import Anatomy
from steer.model.devices import check_weights_are_there
from steer.model.site import Site
from steer.model.tokens import rows_hash

CHUNK_BYTES = 2**24  # of what all writers write at the tokens that are looked at together


def information_flow(
    model: nn.Module, texts: Prompts, *, tokenizer: Any = None, positions: Positions = "sum", max_tokens: int = 2048, progress: bool = True
) -> ComponentScores:
    """Scores of all edges and components of a model on texts.

    With the stream x that reader v takes and u that a writer wrote into it (equations 3 and 4 of the paper, with whole blocks instead of
    attention weights), the score of the edge is

        proximity(u, x) = max(0, |x|_1 - |x - u|_1), over the sum of the proximities of all writers before v,

    averaged over the tokens that have a role and then over texts: those into a reader add up to 1. Readers of one stream, such as queries,
    keys and values of a block, share a score. The score of a node is the mean over the readers that see it.

    What a head writes goes through the norm after attention where there is one, at that norm's denominator. Biases belong to no writer.

    Args:
        positions: see `Texts`; scores are kept apart by role.
        max_tokens: padded tokens of a batch.

    Raises:
        AnatomyError: a model whose reading of the stream is not known. DeployError: weights that are offloaded. ConfigError: no texts.

    Example:
        >>> scores = information_flow(model, ["The capital of France is"], tokenizer=tokenizer)
        >>> scores.top_edges(50)
    """
    check_weights_are_there(model, "information flow")
    anatomy = Anatomy.find(model)
    blocks = stream_readers(model, anatomy)
    rows = rows_of(model, texts, tokenizer)
    passes = TextPasses(model, anatomy, Texts(rows, positions), max_tokens=max_tokens)
    graph = ComponentGraph.of(anatomy, [block.parallel for block in blocks])
    routes = _Routes(anatomy, graph, blocks, len(passes.texts.role_names))
    for prompts in tqdm(list(passes.batches(range(len(rows)))), desc="information flow", unit="batch", disable=None if progress else True):
        batch = passes.batch(prompts)
        routes.add(batch, values_at(passes, batch, routes.sites()))
    edges = routes.edges / len(rows)
    facts = {
        "method": {"name": "information_flow"},
        "sign": "a share of what is read, from 0 to 1",
        "texts": {"count": len(rows), "hash": rows_hash(rows), "windows": window_hashes(rows)},
        "model": anatomy.fingerprint(),
    }
    nodes = edges.sum(-1) / graph.possible.sum(1)
    return ComponentScores(graph, nodes, edges, {}, tuple(passes.texts.role_names), len(rows), facts)


class _Routes:
    """Sums of shares over texts.

    Attributes:
        edges: [roles, writers, readers] fp64.
    """

    def __init__(self, anatomy: Anatomy, graph: ComponentGraph, blocks: Sequence[BlockReaders], roles: int) -> None:
        self.anatomy, self.graph, self.blocks = anatomy, graph, blocks
        self.edges = torch.zeros(roles, len(graph.writers), len(graph.readers), dtype=torch.float64)

    def sites(self) -> list[Site]:
        """What is written, and the streams that are read."""
        layers = range(len(self.blocks))
        streams = [Site(part, layer) for layer in layers for part in ("input", "attn.output")]
        return [*written_sites(len(self.blocks)), *streams, Site("output", len(self.blocks) - 1)]

    @torch.no_grad()
    def add(self, batch: Batch, values: Mapping[Site, Tensor]) -> None:
        """Adds the texts of a batch."""
        counts = (batch.roles >= 0).sum(1)  # [rows] tokens of each text that count
        size = max(1, CHUNK_BYTES // (4 * len(self.graph.writers) * self.anatomy.width))
        for chunk in (batch.roles >= 0).nonzero().split(size):
            at = _Tokens(chunk[:, 0], chunk[:, 1])
            roles, weights = batch.roles[at.rows, at.places], 1 / counts[at.rows].double()  # [tokens]
            self._add_tokens(self._written(values, at), values, at, roles.cpu(), weights.cpu())

    def _written(self, values: Mapping[Site, Tensor], at: _Tokens) -> Tensor:
        """[writers, tokens, width] fp32."""
        written = [at.of(values[Site("embed")]).unsqueeze(0)]
        for layer, block in enumerate(self.blocks):
            z, matrix = Site("attn.z", layer), output_matrix(self.anatomy, layer)  # [heads, head_dim, width]
            by_head = at.of(values[z]).to(matrix.device).unflatten(-1, matrix.shape[:2]).transpose(0, 1)  # [heads, tokens, head_dim]
            heads = by_head @ matrix
            if block.post_norm is not None:
                module = self.anatomy.point(z).module
                attended = module(values[z].to(matrix.device))  # before the norm
                heads = block.post_norm.jvp(at.of(attended), heads, constant_denominator=True)
            written += [heads, at.of(values[Site("mlp.output", layer)]).unsqueeze(0)]
        return torch.cat([part.to(written[0].device) for part in written])

    def _add_tokens(self, written: Tensor, values: Mapping[Site, Tensor], at: _Tokens, roles: Tensor, weights: Tensor) -> None:
        def add(readers: slice, stream: Tensor, before: int) -> None:
            shares = _shares(written[:before], stream.to(written.device)).double().cpu() * weights  # [writers, tokens]
            for role in roles.unique().tolist():
                self.edges[role, :before, readers] += shares[:, roles == role].sum(1, keepdim=True)

        for layer, block in enumerate(self.blocks):
            before = at.of(values[Site("input", layer)])  # [tokens, width]
            places = self.graph.readers_at(layer)
            add(slice(places["q"].start, places["v"].stop), before, self.graph.writers_before(layer, "q"))
            read = before if block.parallel else before + at.of(values[Site("attn.output", layer)]).to(before.device)
            add(places[MLP], read, self.graph.writers_before(layer, MLP))
        last = len(self.graph.readers) - 1
        add(slice(last, last + 1), at.of(values[Site("output", len(self.blocks) - 1)]), len(written))


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Places of tokens in a batch: [tokens] rows and [tokens] places in them."""

    rows: Tensor
    places: Tensor

    def of(self, h: Tensor) -> Tensor:
        """[tokens, width] fp32."""
        return h[self.rows.to(h.device), self.places.to(h.device)].float()


def _shares(written: Tensor, stream: Tensor) -> Tensor:
    """[writers, tokens] proximities over their sum; 0 where none is near. written: [writers, tokens, width], stream: [tokens, width]."""
    distances = torch.stack([(stream - one).abs().sum(-1) for one in written])  # one writer at a time fits a cache
    proximities = (stream.abs().sum(-1) - distances).clamp_min(0)
    return proximities / proximities.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
