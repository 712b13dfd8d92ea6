"""Components of a model as a graph: what writes to the residual stream, what reads it, and which writer comes before which reader.

Writers are the embedding, every attention head and every MLP. Readers are the queries of every head, the keys and values of every
key-value group, every MLP, and the logits. Under grouped-query attention query heads share keys and values, which are one reader here,
not one for each head that uses them: a model has about half as many edges as in the graphs that copy them (Ameisen, Syed & Nanda 2023,
EAP, arXiv 2310.10348, and ACDC, arXiv 2304.14997, count the copies).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import AnatomyError, ConfigError, did_you_mean
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of

INPUT, LOGITS = "input", "logits"
HEAD, MLP = "head", "mlp"  # kinds of writers, beside INPUT
_HEAD = re.compile(r"a(\d+)\.h(\d+)")
_MLP = re.compile(r"m(\d+)")


@dataclass(frozen=True)
class LayerShape:
    """Components of one block.

    Attributes:
        heads: query heads. groups: key-value heads, as many or fewer.
        parallel: the MLP reads what attention reads, and not what attention adds.
    """

    heads: int
    groups: int
    parallel: bool = False


@dataclass(frozen=True)
class Writer:
    """What writes to the residual stream: `input`, a head `a3.h5`, or an MLP `m3`.

    Attributes:
        kind: `input`, `head` or `mlp`. layer: None for the input. head: None where it is none.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        return {INPUT: INPUT, HEAD: f"a{self.layer}.h{self.head}", MLP: f"m{self.layer}"}[self.kind]


@dataclass(frozen=True)
class Reader:
    """What reads the residual stream.

    Attributes:
        kind: `q`, `k`, `v`, `mlp` or `logits`. layer: None for the logits.
        index: head of `q`, key-value group of `k` and `v`.
        grouped: a group of `k` and `v` has several heads, so that it is called `a3.g1<k>`, not `a3.h1<k>`.
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    grouped: bool = False

    @property
    def name(self) -> str:
        if self.kind == LOGITS:
            return LOGITS
        if self.kind == MLP:
            return f"m{self.layer}"
        return f"a{self.layer}.{'g' if self.grouped and self.kind in 'kv' else 'h'}{self.index}<{self.kind}>"


@dataclass(frozen=True)
class ComponentGraph:
    """Writers, readers and possible edges of a decoder.

    Attributes:
        layers: shapes of the blocks in order.

    Example:
        >>> graph = ComponentGraph.of(steer.Anatomy.find(model))
        >>> graph.n_edges  # of a model of SmolLM2-135M's depth and heads
        70651
    """

    layers: tuple[LayerShape, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, parallel: Sequence[bool] | None = None) -> Self:
        """The graph of a model. parallel: of each block, as `StreamReaders` proves it; all in sequence where None.

        Raises:
            SiteError: a block whose attention or MLP is not known, or whose heads are not.
        """
        shapes = []
        for layer in range(anatomy.n_layers):
            heads = heads_of(anatomy, layer, "attn.q")
            anatomy.writer(layer, "mlp")
            shapes.append(LayerShape(heads.n_heads, heads.n_kv_heads, bool(parallel and parallel[layer])))
        return cls(tuple(shapes))

    # ---- nodes

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        """In the order of a pass."""
        found = [Writer(INPUT)]
        for layer, shape in enumerate(self.layers):
            found += [Writer(HEAD, layer, head) for head in range(shape.heads)] + [Writer(MLP, layer)]
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """In the order of a pass: of each block the queries of its heads, keys and values of its groups, its MLP; then the logits."""
        found = []
        for layer, shape in enumerate(self.layers):
            grouped = shape.groups < shape.heads
            found += [Reader("q", layer, head) for head in range(shape.heads)]
            found += [Reader(part, layer, group, grouped) for part in "kv" for group in range(shape.groups)]
            found.append(Reader(MLP, layer))
        return (*found, Reader(LOGITS))

    def heads_at(self, layer: int) -> slice:
        """Places of a block's heads among the writers; its MLP is the next."""
        start = 1 + sum(shape.heads + 1 for shape in self.layers[:layer])
        return slice(start, start + self.layers[layer].heads)

    def mlp_at(self, layer: int) -> int:
        """Place of a block's MLP among the writers."""
        return self.heads_at(layer).stop

    def readers_at(self, layer: int) -> dict[str, slice]:
        """Places among the readers of a block's `q`, `k`, `v` and `mlp`."""
        start = sum(shape.heads + 2 * shape.groups + 1 for shape in self.layers[:layer])
        shape, found = self.layers[layer], {}
        for part, count in (("q", shape.heads), ("k", shape.groups), ("v", shape.groups), (MLP, 1)):
            found[part] = slice(start, start + count)
            start += count
        return found

    def writers_before(self, layer: int, kind: str) -> int:
        """How many of the writers a reader can see: those of the blocks before, and of its own the heads for an MLP that follows them."""
        heads = self.heads_at(layer)
        return heads.stop if kind == MLP and not self.layers[layer].parallel else heads.start

    @cached_property
    def possible(self) -> Tensor:
        """[writers, readers] bool, whether there is an edge."""
        edges = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for layer in range(len(self.layers)):
            for kind, places in self.readers_at(layer).items():
                edges[: self.writers_before(layer, kind), places] = True
        edges[:, -1] = True
        return edges

    @property
    def n_edges(self) -> int:
        return int(self.possible.sum())

    # ---- names

    @cached_property
    def _writer_places(self) -> dict[str, int]:
        return {writer.name: place for place, writer in enumerate(self.writers)}

    @cached_property
    def _reader_places(self) -> dict[str, int]:
        return {reader.name: place for place, reader in enumerate(self.readers)}

    def writer_place(self, name: str) -> int:
        """Place of a writer by its name, `input`, `a3.h5` or `m3`. Raises ConfigError for one that the model does not have."""
        if name not in self._writer_places:
            raise _unknown("writer", name, self._writer_places)
        return self._writer_places[name]

    def reader_place(self, name: str) -> int:
        """Place of a reader by its name, `a3.h5<q>`, `a3.g1<k>`, `m3` or `logits`. Raises ConfigError."""
        if name not in self._reader_places:
            raise _unknown("reader", name, self._reader_places)
        return self._reader_places[name]

    def edges(self, mask: Tensor) -> Iterator[str]:
        """Names of chosen edges, `a0.h1->m3`. mask: [writers, readers] bool."""
        for writer, reader in (mask & self.possible).nonzero().tolist():
            yield f"{self.writers[writer].name}->{self.readers[reader].name}"

    # ---- pruning

    @cached_property
    def reads_for(self) -> Tensor:
        """[readers, writers] bool, whether a writer uses what a reader reads: a head its queries and the keys and values of its group."""
        uses = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        for layer, shape in enumerate(self.layers):
            first, places = self.heads_at(layer).start, self.readers_at(layer)
            for head in range(shape.heads):
                group = head * shape.groups // shape.heads
                for part, index in (("q", head), ("k", group), ("v", group)):
                    uses[places[part].start + index, first + head] = True
            uses[places[MLP].start, self.mlp_at(layer)] = True
        return uses

    def pruned(self, edges: Tensor) -> Tensor:
        """Edges without those that lead nowhere: from a writer that nothing reaches, or into readers of writers that reach nothing.

        Repeated until nothing changes. The input needs no edge into it, the logits none out of them.

        Args:
            edges: [writers, readers] bool.

        Returns:
            [writers, readers] bool.
        """
        uses = self.reads_for.float()
        kept = edges & self.possible
        while True:
            reached = (kept.any(0).float() @ uses) > 0  # [writers] something flows into it
            reached[0] = True
            leads_on = (uses @ kept.any(1).float()) > 0  # [readers] a writer that uses it has an edge out
            leads_on[-1] = True
            fewer = kept & reached[:, None] & leads_on[None]
            if torch.equal(fewer, kept):
                return kept
            kept = fewer

    # ---- files

    def as_facts(self) -> list[dict[str, Any]]:
        """JSON-able."""
        return [{"heads": shape.heads, "groups": shape.groups, "parallel": shape.parallel} for shape in self.layers]

    @classmethod
    def from_facts(cls, facts: Sequence[dict[str, Any]]) -> Self:
        """Rebuilds it from the facts of a file."""
        return cls(tuple(LayerShape(int(each["heads"]), int(each["groups"]), bool(each["parallel"])) for each in facts))


def check_heads_share(anatomy: Anatomy) -> None:
    """Raises AnatomyError where query heads cannot be shared out evenly over the key-value groups."""
    for layer in range(anatomy.n_layers):
        heads = heads_of(anatomy, layer, "attn.q")
        if heads.n_heads % heads.n_kv_heads:
            raise AnatomyError(
                f"block {layer} of this {anatomy.kind} has heads that its key-value groups do not share evenly",
                expected=f"a multiple of {heads.n_kv_heads} query heads",
                found=heads.n_heads,
                remedy="keep it in a file of steer's own form, with save(path)",
            )


# ---- errors


def _unknown(what: str, name: str, known: dict[str, int]) -> ConfigError:
    return ConfigError(
        f"this model has no {what} '{name}'",
        expected="input, a head a<layer>.h<head> or an MLP m<layer>"
        if what == "writer"
        else "a<layer>.h<head><q>, a<layer>.g<group><k> or <v> (h where heads share no keys), m<layer> or logits",
        found=name,
        remedy=did_you_mean(name, list(known)) or f"its {what}s are {', '.join([*known][:4])}, ..., {[*known][-1]}",
    )
