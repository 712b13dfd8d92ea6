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
from steer.circuits.stream_readers import BlockReaders
from steer.kernels import edge_scores
from steer.model.anatomy import Anatomy
from steer.model.site import Site

# What writers change at the tokens that are contracted together. More than fits a cache is read from memory once for each group of layers:
# 64 MiB ran at 44 GFLOP/s on a CPU core, 16 MiB at 120.
CHUNK_BYTES = 2**24
LAYERS_AT_ONCE = 4  # readers of so many blocks share a matrix product: 16 readers at a time ran at 100 GFLOP/s, 64 at 144

Tokens = slice | Tensor  # places of tokens, rows one after the other


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
        writers, width = len(self.graph.writers), self.anatomy.width
        scores = torch.zeros(writers, len(self.graph.readers), dtype=torch.float64)
        device = change[Site("embed")].device
        size = max(1, self.chunk_bytes // (4 * writers * width))
        written = torch.empty(writers * size * width, device=device)  # what it holds is written over from chunk to chunk
        for chunk in is_in.flatten().nonzero().flatten().split(size):
            first, last = int(chunk[0]), int(chunk[-1])
            # neighbours are looked at, others copied
            at = slice(first, last + 1) if last - first + 1 == len(chunk) else chunk
            view = written[: writers * len(chunk) * width].view(writers, len(chunk), width)
            self._write(view, change, found, at, only)
            scores += self._contracted(view, found, at)
        return scores * self.graph.possible  # of blocks that share a product, some writers come after some readers

    def _write(self, written: Tensor, change: Mapping[Site, Tensor], found: Record, at: Tokens, only: Site | None) -> None:
        """Fills [writers, tokens, width] with what each writer changes in the stream."""
        if only is not None:
            written.zero_()
        if only in (None, Site("embed")):
            written[0] = _of(change[Site("embed")], at, written.device)
        for layer, block in enumerate(self.blocks):
            z, mlp, heads = Site("attn.z", layer), Site("mlp.output", layer), self.graph.heads_at(layer)
            if only in (None, z):
                matrix = output_matrix(self.anatomy, layer)  # [heads, head_dim, width]
                by_head = _by_head(_of(change[z], at, matrix.device), matrix)  # [heads, tokens, head_dim]
                if block.post_norm is None:
                    _product(by_head, matrix, written[heads])
                else:
                    attended = self.anatomy.point(z).module(found.values[z].flatten(0, 1)[at].to(matrix.device))  # before the norm
                    written[heads] = block.post_norm.jvp(
                        attended.float(), by_head @ matrix, constant_denominator=self.constant_denominator
                    ).to(written.device)
            if only in (None, mlp):
                written[self.graph.mlp_at(layer)] = _of(change[mlp], at, written.device)

    def _contracted(self, written: Tensor, found: Record, at: Tokens) -> Tensor:
        scores = torch.zeros(len(written), len(self.graph.readers), dtype=torch.float64)
        flat = written.flatten(1)  # [writers, tokens * width]
        for layers in torch.arange(len(self.blocks)).split(LAYERS_AT_ONCE):
            first, last = int(layers[0]), int(layers[-1])
            start, stop = self.graph.readers_at(first)["q"].start, self.graph.readers_at(last)[MLP].stop
            read = written.new_empty(stop - start, *written.shape[1:])  # [readers, tokens, width]
            for layer in layers.tolist():
                self._read(read, start, layer, found, at)
            before = self.graph.mlp_at(last)  # writers that one of these readers can see
            scores[:before, start:stop] = products(written[:before], read).double().cpu()
        last_stream = _of(found.gradients[self._last], at, written.device)  # [tokens, width]
        scores[:, -1] = (flat @ last_stream.flatten()).double().cpu()
        return scores

    def _read(self, read: Tensor, start: int, layer: int, found: Record, at: Tokens) -> None:
        """Fills the part of [readers, tokens, width] that is one block's with gradients by the stream. start: the first reader."""
        block, places = self.blocks[layer], self.graph.readers_at(layer)
        before = _of(found.values.get(Site("input", layer)), at, read.device)
        after = before
        if block.mlp is not None and not block.parallel:
            after = before + _of(found.values[Site("attn.output", layer)], at, read.device)
        for part in "qkv":
            matrix = reading_matrix(self.anatomy, layer, part)  # [heads or groups, head_dim, width]
            g = _by_head(_of(found.gradients[Site(f"attn.{part}", layer)], at, matrix.device), matrix)
            _product(g, matrix, read[places[part].start - start : places[part].stop - start])
        read[places[MLP].start - start] = _of(found.gradients[Site("mlp.input", layer)], at, read.device)
        if block.attention is not None:
            of_attention = read[places["q"].start - start : places["v"].stop - start]
            block.attention.vjp_(before, of_attention, constant_denominator=self.constant_denominator)
        if block.mlp is not None:
            of_mlp = read[places[MLP].start - start : places[MLP].stop - start]
            block.mlp.vjp_(after, of_mlp, constant_denominator=self.constant_denominator)


def products(written: Tensor, read: Tensor) -> Tensor:
    """[writers, readers] fp32, summed over tokens and width, of [writers, tokens, width] and [readers, tokens, width].

    On a GPU by the kernel, which reads both once; on a CPU one matrix product is 20 % faster than the kernel's reference.
    """
    if written.device.type == "cuda":
        return edge_scores(written.transpose(0, 1), None, read.transpose(0, 1))
    return written.flatten(1) @ read.flatten(1).T


def _of(h: Tensor | None, at: Tokens, device: torch.device) -> Tensor:
    """[tokens, width] fp32 of chosen tokens. A stream that no norm reads is not recorded."""
    if h is None:
        return torch.empty(0, device=device)
    return h.flatten(0, 1)[at if isinstance(at, slice) else at.to(h.device)].to(device).float()


def _by_head(h: Tensor, matrix: Tensor) -> Tensor:
    """[heads, tokens, head_dim] of [tokens, heads * head_dim]. matrix: [heads, head_dim, ...]."""
    return h.unflatten(-1, matrix.shape[:2]).transpose(0, 1)


def _product(by_head: Tensor, matrix: Tensor, into: Tensor) -> None:
    """Writes a product [heads, tokens, width] where it belongs."""
    if into.device == matrix.device:
        torch.bmm(by_head, matrix, out=into)
    else:
        into.copy_(by_head @ matrix)
