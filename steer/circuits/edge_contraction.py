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

CHUNK_BYTES = 2**26  # of what writers change at the tokens that are contracted together


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
        return scores

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
                    heads = block.post_norm.jvp(attended.float(), heads, constant_denominator=self.constant_denominator)
                written[self.graph.heads_at(layer)] = heads.to(written.device)
            if only in (None, mlp):
                written[self.graph.mlp_at(layer)] = _of(change[mlp], at, written.device)
        return written

    def _contracted(self, written: Tensor, found: Record, at: tuple[Tensor, Tensor]) -> Tensor:
        scores = torch.zeros(len(written), len(self.graph.readers), dtype=torch.float64)
        flat = written.flatten(1)  # [writers, tokens * width]
        for layer, block in enumerate(self.blocks):
            before = _of(found.values.get(Site("input", layer)), at, written.device)
            places = self.graph.readers_at(layer)
            # [query heads + 2 * groups, tokens, width]
            read = torch.cat([self._through_projection(layer, part, found, at, written.device) for part in "qkv"])
            attended = slice(places["q"].start, places["v"].stop)
            scores[:, attended] = self._dot(flat, self._through_norm(block.attention, before, read), self.graph.writers_before(layer, "q"))
            after = before
            if block.mlp is not None and not block.parallel:
                after = before + _of(found.values[Site("attn.output", layer)], at, written.device)
            of_mlp = _of(found.gradients[Site("mlp.input", layer)], at, written.device).unsqueeze(0)  # [1, tokens, width]
            scores[:, places[MLP]] = self._dot(flat, self._through_norm(block.mlp, after, of_mlp), self.graph.writers_before(layer, MLP))
        last = _of(found.gradients[self._last], at, written.device).unsqueeze(0)
        scores[:, -1:] = self._dot(flat, last, len(written))
        return scores

    def _through_projection(self, layer: int, part: str, found: Record, at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
        """[heads or groups, tokens, width] gradient by the normed stream of each."""
        matrix = reading_matrix(self.anatomy, layer, part)  # [heads or groups, head_dim, width]
        g = _of(found.gradients[Site(f"attn.{part}", layer)], at, matrix.device)
        return (g.unflatten(-1, matrix.shape[:2]).transpose(0, 1) @ matrix).to(device)

    def _through_norm(self, norm: NormFormula | None, stream: Tensor, gradient: Tensor) -> Tensor:
        """[readers, tokens, width] gradient by the stream."""
        return gradient if norm is None else norm.vjp(stream, gradient, constant_denominator=self.constant_denominator)

    def _dot(self, written: Tensor, read: Tensor, before: int) -> Tensor:
        """[writers, readers] products; 0 for writers that come after. written: [writers, tokens * width]."""
        scores = torch.zeros(len(written), len(read), dtype=torch.float64)
        scores[:before] = (written[:before] @ read.flatten(1).T).double().cpu()
        return scores


def _of(h: Tensor | None, at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """[tokens, width] fp32 of chosen tokens. A stream that no norm reads is not recorded."""
    if h is None:
        return torch.empty(0, device=device)
    return h[at[0].to(h.device), at[1].to(h.device)].to(device).float()
