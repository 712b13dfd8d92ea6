"""Edge scores of one pass: what each writer changes, times the gradient where each reader reads, summed over tokens.

Neither the residual stream nor what heads write is copied per head: the gradient of a reader is taken at the output of its projection and
brought back through projection and norm, the change of a head is taken at the input of the output projection. Both are [tokens, width]
wide for a chunk of tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.component_pass import Record
from steer.circuits.component_weights import output_matrix, reading_matrix
from steer.circuits.components import MLP, ComponentGraph
from steer.circuits.linear import NormFormula
from steer.circuits.stream_readers import BlockReaders
from steer.model.anatomy import Anatomy
from steer.model.site import Site

# What writers change at the tokens that are contracted together. More than fits a cache is read from memory once for each group of layers:
# 64 MiB ran at 44 GFLOP/s on a CPU core, 16 MiB at 120.
CHUNK_BYTES = 2**24
LAYERS_AT_ONCE = 4  # readers of so many blocks share a matrix product: 16 readers at a time ran at 100 GFLOP/s, 64 at 144


@dataclass(frozen=True, eq=False)
class EdgeContraction:
    """Contracts the tokens of passes.

    Attributes:
        blocks: how the components of each block read the stream.
        constant_denominator: of the norms before readers, as some backward rules take it.
    """

    anatomy: Anatomy
    graph: ComponentGraph
    blocks: Sequence[BlockReaders]
    constant_denominator: bool = False
    chunk_bytes: int = CHUNK_BYTES

    def streams(self) -> list[Site]:
        """Sites whose values a pass has to record for the norms before the readers."""
        found = []
        for layer, block in enumerate(self.blocks):
            if block.attention is not None or block.mlp is not None:
                found.append(Site("input", layer))
            if block.mlp is not None and not block.parallel:
                found.append(Site("attn.output", layer))
            if block.post_norm is not None:
                found.append(Site("attn.z", layer))
        return found

    def readers(self) -> list[Site]:
        """Sites whose gradients a pass has to record."""
        layers = range(len(self.blocks))
        return [*(Site(part, layer) for layer in layers for part in ("attn.q", "attn.k", "attn.v", "mlp.input")), self._last]

    @property
    def _last(self) -> Site:
        return Site("output", len(self.blocks) - 1)

    @torch.no_grad()
    def __call__(self, change: Mapping[Site, Tensor], found: Record, is_in: Tensor, *, only: Site | None = None) -> Tensor:
        """[writers, readers] fp64, sums over tokens.

        Args:
            change: by site, [rows, tokens, width] fp32 of the embedding, z and the outputs of MLPs.
            found: the pass that gradients come from.
            is_in: [rows, tokens] bool, tokens that count.
            only: writers at one site count alone.
        """
        width, writers = self.anatomy.width, len(self.graph.writers)
        scores = torch.zeros(writers, len(self.graph.readers), dtype=torch.float64)
        tokens = is_in.nonzero()  # [chosen tokens, 2]
        size = max(1, self.chunk_bytes // (4 * writers * width))
        for chunk in tokens.split(size):
            at = (chunk[:, 0], chunk[:, 1])
            written = self._written(change, found, at, only)
            scores += self._contracted(written, found, at)
        return scores * self.graph.possible  # of blocks that share a product, some writers come after some readers

    def _written(self, change: Mapping[Site, Tensor], found: Record, at: tuple[Tensor, Tensor], only: Site | None) -> Tensor:
        """[writers, tokens, width] what each writer changes in the stream."""
        embed = change[Site("embed")]
        written = embed.new_zeros(len(self.graph.writers), len(at[0]), self.anatomy.width)
        if only in (None, Site("embed")):
            written[0] = embed[at]
        for layer, block in enumerate(self.blocks):
            z, mlp = Site("attn.z", layer), Site("mlp.output", layer)
            if only in (None, z):
                matrix = output_matrix(self.anatomy, layer)  # [heads, head_dim, width]
                by_head = _of(change[z], at, matrix.device).unflatten(-1, matrix.shape[:2]).transpose(0, 1)  # [heads, tokens, head_dim]
                heads = by_head @ matrix
                if block.post_norm is not None:
                    attended = self.anatomy.point(z).module(found.values[z].to(matrix.device)[at])  # before the norm
                    heads = block.post_norm.jvp(attended.float(), heads)
                written[self.graph.heads_at(layer)] = heads.to(written.device)
            if only in (None, mlp):
                written[self.graph.mlp_at(layer)] = _of(change[mlp], at, written.device)
        return written

    def _contracted(self, written: Tensor, found: Record, at: tuple[Tensor, Tensor]) -> Tensor:
        scores = torch.zeros(len(written), len(self.graph.readers), dtype=torch.float64)
        flat = written.flatten(1)  # [writers, tokens * width]
        for layers in torch.arange(len(self.blocks)).split(LAYERS_AT_ONCE):
            first, last = int(layers[0]), int(layers[-1])
            read = torch.cat([part for layer in layers.tolist() for part in self._read(layer, found, at, written.device)])
            places = slice(self.graph.readers_at(first)["q"].start, self.graph.readers_at(last)[MLP].stop)
            before = self.graph.mlp_at(last)  # writers that one of these readers can see
            scores[:before, places] = (flat[:before] @ read.flatten(1).T).double().cpu()
        last_stream = _of(found.gradients[self._last], at, written.device)  # [tokens, width]
        scores[:, -1] = (flat @ last_stream.flatten()).double().cpu()
        return scores

    def _read(self, layer: int, found: Record, at: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """[query heads + 2 * groups, tokens, width] and [1, tokens, width] gradients by the stream where attention and MLP read it."""
        block = self.blocks[layer]
        before = _of(found.values.get(Site("input", layer)), at, device)
        after = before
        if block.mlp is not None and not block.parallel:
            after = before + _of(found.values[Site("attn.output", layer)], at, device)
        attention = torch.cat([self._through_projection(layer, part, found, at, device) for part in "qkv"])
        mlp = _of(found.gradients[Site("mlp.input", layer)], at, device).unsqueeze(0)
        return self._through_norm(block.attention, before, attention), self._through_norm(block.mlp, after, mlp)

    def _through_projection(self, layer: int, part: str, found: Record, at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
        """[heads or groups, tokens, width] gradient by the normed stream of each."""
        matrix = reading_matrix(self.anatomy, layer, part)  # [heads or groups, head_dim, width]
        g = _of(found.gradients[Site(f"attn.{part}", layer)], at, matrix.device)
        return (g.unflatten(-1, matrix.shape[:2]).transpose(0, 1) @ matrix).to(device)

    def _through_norm(self, norm: NormFormula | None, stream: Tensor, gradient: Tensor) -> Tensor:
        """[readers, tokens, width] gradient by the stream."""
        return gradient if norm is None else norm.vjp(stream, gradient, constant_denominator=self.constant_denominator)


def _of(h: Tensor | None, at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """[tokens, width] fp32 of chosen tokens. A stream that no norm reads is not recorded."""
    if h is None:
        return torch.empty(0, device=device)
    return h[at[0].to(h.device), at[1].to(h.device)].to(device).float()
