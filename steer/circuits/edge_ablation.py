"""Ablation of edges, exactly: a reader that lost edges reads the stream with what takes the place of those writers, and all others read
the stream as it is.

Of each writer that lost an edge the change (what takes its place less what it writes in the pass that runs) is kept until the last reader.
A reader's queries, keys, values or MLP input move by the difference that its own corrected stream makes behind the norm, so that readers
that lost nothing are not touched, and nothing depends on tokens other than the current one: it is the same with a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steer.circuits.component_weights import by_reading_head, by_writing_head, in_features, is_plain, live_rows, without_bias
from steer.circuits.components import MLP, ComponentGraph
from steer.circuits.stream_readers import BlockReaders
from steer.errors import ConfigError, ContextError
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext, PassScratch
from steer.model.hook_registration import AFTER_EDITS
from steer.model.hooks import HookFunction
from steer.model.site import Site

# (site, activation [rows, tokens, width]) -> what takes its place, of a shape that fits
Replacement = Callable[[Site, Tensor], Tensor]
PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class SiteFunction:
    """A hook function that runs after the edits of plans, so that it sees what the model goes on with."""

    call: Callable[[Tensor, ForwardContext], Tensor | None]
    order: int = AFTER_EDITS

    def __call__(self, h: Tensor, context: ForwardContext, /) -> Tensor | None:
        return self.call(h, context)


@dataclass(frozen=True, eq=False)
class _CutReaders:
    """Readers that lost an edge and read the stream of one block at the same place.

    Attributes:
        sets: [sets, rows or 1, changes of the site] fp32 by site, 1 where an edge is cut, of the sites where one is; readers with the
            same cut edges share a set. Changes are those of writers that lost any edge.
        readers: [readers] number in their part, and [readers] the set of each, by part.
    """

    sets: Mapping[Site, Tensor]
    readers: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Pass:
    """What is kept in one pass.

    Attributes:
        changes: [writers, rows, tokens, width] of those that lost an edge, of each site in the order of the pass; once for each
            replacement.
        recorded: by site, whether autograd recorded what is kept of it.
        attended: by block with a norm behind attention, what goes into that norm.
        streams: by block, what went into it, and what attention added.
        normed: by block, [sets, rows, tokens, width] how much more the cut readers of its attention get from the norm.
    """

    changes: dict[Site, Tensor] = field(default_factory=dict)
    recorded: dict[Site, bool] = field(default_factory=dict)
    attended: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    normed: dict[int, Tensor] = field(default_factory=dict)

    def note(self, site: Site) -> None:
        self.recorded[site] = torch.is_grad_enabled()

    def check(self, site: Site) -> None:
        """Raises ContextError where a gradient would leave out, or go twice through, what is kept of a site."""
        if self.recorded[site] != torch.is_grad_enabled():
            raise _other_recording(site)

    def enter_block(self) -> None:
        """Drops what only the block before needed, unless gradients are recorded: a checkpointed block may be recomputed from within."""
        if not torch.is_grad_enabled():
            self.streams.clear()
            self.normed.clear()


class EdgeAblation:
    """Functions at sites that cut edges in every pass.

    Args:
        blocks: how the components of each block read the stream.
        cut: [writers, readers] bool; or [rows, writers, readers], for each row of a batch its own.
        replacement: what takes the place of what a writer writes with, at `embed`, `attn.z` and `mlp.output`.
        strength: 1 cuts, 0 leaves, between and above in proportion to the change.
        more: further cut edges, each with a replacement of its own.

    Raises:
        ConfigError: an edge that there is not, or no edge.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        graph: ComponentGraph,
        blocks: Sequence[BlockReaders],
        cut: Tensor,
        replacement: Replacement,
        strength: float = 1.0,
        more: Sequence[tuple[Tensor, Replacement]] = (),
    ) -> None:
        self.replacements = [replacement, *(other for _, other in more)]
        cuts = [each if each.dim() == 3 else each.unsqueeze(0) for each in (cut, *(edges for edges, _ in more))]
        wrong = torch.cat(cuts).any(0) & ~graph.possible
        if bool(wrong.any()):
            raise _no_such_edge(graph, wrong)
        self.anatomy, self.graph, self.blocks, self.strength = anatomy, graph, blocks, strength
        rows = max(len(each) for each in cuts)
        by_replacement = torch.stack([each.expand(rows, -1, -1) for each in cuts], 1)  # [rows, replacements, writers, readers]
        self._loses = by_replacement.any(3).any(0)  # [replacements, writers]
        if not bool(self._loses.any()):
            raise _no_edges()
        self._order, self._columns = self._columns_of_sites()
        cut = by_replacement.flatten(1, 2)[:, self._order]  # [rows, changes, readers]
        self._attention: dict[int, _CutReaders] = {}
        self._mlp: dict[int, _CutReaders] = {}
        for layer in range(len(blocks)):
            places = graph.readers_at(layer)
            if (readers := self._cut_readers(cut, {part: places[part] for part in PARTS})) is not None:
                self._attention[layer] = readers
            if (readers := self._cut_readers(cut, {MLP: places[MLP]})) is not None:
                self._mlp[layer] = readers
        self._logits = self._cut_readers(cut, {"logits": slice(len(graph.readers) - 1, len(graph.readers))})
        self._passes: weakref.WeakKeyDictionary[PassScratch, _Pass] = weakref.WeakKeyDictionary()

    def _cut_readers(self, cut: Tensor, places: Mapping[str, slice]) -> _CutReaders | None:
        columns = torch.cat([cut[..., of_part] for of_part in places.values()], -1).permute(2, 0, 1)  # [readers, rows, changes]
        lost = columns.flatten(1).any(1)
        if not bool(lost.any()):
            return None
        sets, of_reader = columns[lost].unique(dim=0, return_inverse=True)
        set_of = torch.full((len(columns),), -1)
        set_of[lost] = of_reader
        readers, first = {}, 0
        for part, of_part in places.items():
            of_this = set_of[first : first + of_part.stop - of_part.start]
            if bool((of_this >= 0).any()):
                chosen = (of_this >= 0).nonzero().flatten()
                readers[part] = (chosen, of_this[chosen])
            first += len(of_this)
        by_site = {site: sets[..., of_site].float() for site, of_site in self._columns.items() if bool(sets[..., of_site].any())}
        return _CutReaders(by_site, readers)

    def _columns_of_sites(self) -> tuple[Tensor, dict[Site, slice]]:
        """[changes] places among replacements x writers of what is changed, in the order of the pass, and which are those of each site."""
        order, found, first = [], {}, 0
        sites = [(Site("embed"), slice(0, 1))]
        for layer in range(len(self.blocks)):
            mlp = self.graph.mlp_at(layer)
            sites += [(Site("attn.z", layer), self.graph.heads_at(layer)), (Site("mlp.output", layer), slice(mlp, mlp + 1))]
        for site, places in sites:
            of_site = [
                number * len(self.graph.writers) + places.start + loses[places].nonzero().flatten()
                for number, loses in enumerate(self._loses)
            ]
            order += of_site
            found[site] = slice(first, first + sum(map(len, of_site)))
            first = found[site].stop
        return torch.cat(order), found

    # ---- functions at sites

    def functions(self) -> dict[Site, HookFunction]:
        """By site, in the order of the pass; only at writers and readers that lost an edge, and where the stream has to be seen."""
        found: dict[Site, HookFunction] = {}

        def add(site: Site, call: Callable[[Tensor, ForwardContext], Tensor | None]) -> None:
            found[site] = SiteFunction(call)

        if bool(self._loses[:, 0].any()):
            add(Site("embed"), self._writes(Site("embed"), self._loses[:, :1]))
        for layer, block in enumerate(self.blocks):
            mlp_at = self.graph.mlp_at(layer)
            heads, mlp = self._loses[:, self.graph.heads_at(layer)], self._loses[:, mlp_at : mlp_at + 1]
            attention, of_mlp = self._attention.get(layer), self._mlp.get(layer)
            if attention is not None or of_mlp is not None:
                add(Site("input", layer), self._enters(layer, attention))
            for part in PARTS if attention is not None else ():
                if part in attention.readers:  # type: ignore[union-attr]
                    add(Site(f"attn.{part}", layer), self._reads_head(layer, part, attention))  # type: ignore[arg-type]
            if bool(heads.any()):
                add(Site("attn.z", layer), self._writes(Site("attn.z", layer), heads))
            if of_mlp is not None:
                if not block.parallel:
                    add(Site("attn.output", layer), self._adds(layer))
                add(Site("mlp.input", layer), self._reads_mlp(layer, of_mlp))
            if bool(mlp.any()):
                add(Site("mlp.output", layer), self._writes(Site("mlp.output", layer), mlp))
        if self._logits is not None:
            add(Site("output", len(self.blocks) - 1), self._reads_last(self._logits))
        return found

    def forget(self) -> None:
        """Drops what is kept of the last pass."""
        self._passes.clear()

    def _of(self, context: ForwardContext) -> _Pass:
        return self._passes.setdefault(context.scratch, _Pass())

    def _writes(self, site: Site, loses: Tensor) -> Callable[[Tensor, ForwardContext], None]:
        """Keeps what changes where each writer of a site is cut. loses: [replacements, writers of the site]."""
        chosen = [(replacement, of_one.nonzero().flatten()) for replacement, of_one in zip(self.replacements, loses, strict=True)]
        chosen = [(replacement, places) for replacement, places in chosen if len(places)]

        def function(h: Tensor, context: ForwardContext) -> None:
            kept = self._of(context)
            kept.note(site)
            changes = [(_wide(replacement(site, h)) - _wide(h)).expand(h.shape) for replacement, _ in chosen]  # each [rows, tokens, width]
            if site.part == "attn.z":
                layer = site.layer or 0
                for number, (_, places) in enumerate(chosen):
                    by_head = changes[number].unflatten(-1, (loses.shape[1], -1)).movedim(-2, 0)  # [heads, rows, tokens, head_dim]
                    changes[number] = self._written(layer, by_head, places.to(h.device))
                if self.blocks[layer].post_norm is not None:
                    kept.attended[layer] = self.anatomy.point(site).module.forward(h)  # before the norm
            else:
                changes = [change.unsqueeze(0) for change in changes]
            kept.changes[site] = changes[0] if len(changes) == 1 else torch.cat(changes)

        return function

    def _written(self, layer: int, by_head: Tensor, places: Tensor) -> Tensor:
        """[heads at the places, rows, tokens, width] what heads write. by_head: [heads, rows, tokens, head_dim] z of all."""
        module = self.anatomy.point(Site("attn.z", layer)).module
        if is_plain(module) or len(places) * by_head[0, ..., 0].numel() >= in_features(module):
            matrix = by_writing_head(self.anatomy, layer, live_rows(module))[places].to(by_head.dtype)  # [heads, head_dim, width]
            return torch.einsum("hrtd,hdw->hrtw", by_head[places], matrix)
        # fewer calls than one for each unit vector: the input of each head alone
        alone = by_head.new_zeros(len(places), len(by_head), *by_head.shape[1:])
        alone[torch.arange(len(places), device=places.device), places] = by_head[places]
        return _wide(without_bias(module, alone.movedim(1, -2).flatten(-2).to(_dtype(module))))

    def _enters(self, layer: int, attention: _CutReaders | None) -> Callable[[Tensor, ForwardContext], None]:
        """Sees the stream that a block is given."""
        block = self.blocks[layer]
        mlp_needs_it = layer in self._mlp

        def function(h: Tensor, context: ForwardContext) -> None:
            kept = self._of(context)
            kept.enter_block()
            kept.note(Site("input", layer))
            if mlp_needs_it:
                kept.streams[layer, "input"] = h.clone()  # some models add to it in place (Falcon)
            if attention is not None:
                kept.normed[layer] = self._moved(block.attention_norm, h, attention, kept)

        return function

    def _adds(self, layer: int) -> Callable[[Tensor, ForwardContext], None]:
        def function(h: Tensor, context: ForwardContext) -> None:
            self._of(context).streams[layer, "attn.output"] = h

        return function

    def _reads_head(self, layer: int, part: str, cut: _CutReaders) -> Callable[[Tensor, ForwardContext], Tensor]:
        """Moves the queries of heads, or keys or values of groups, that lost an edge."""
        heads, sets = cut.readers[part]

        def function(h: Tensor, context: ForwardContext) -> Tensor:
            kept = self._of(context)
            kept.check(Site("input", layer))
            normed = kept.normed[layer]
            moved = self._read(layer, part, normed, heads.to(normed.device), sets.to(normed.device))
            by_head = h.unflatten(-1, (-1, moved.shape[-1]))  # [rows, tokens, heads, head_dim]
            return by_head.index_add(-2, heads.to(h.device), moved.to(h.device, h.dtype)).flatten(-2)

        return function

    def _read(self, layer: int, part: str, normed: Tensor, heads: Tensor, sets: Tensor) -> Tensor:
        """[rows, tokens, readers, head_dim] what readers make of the normed stream of their sets."""
        module = self.anatomy.point(Site(f"attn.{part}", layer)).module
        if is_plain(module) or normed[..., 0].numel() >= in_features(module):
            matrix = by_reading_head(self.anatomy, layer, part, live_rows(module))[heads].to(normed.dtype)  # [readers, head_dim, width]
            return torch.einsum("srtw,shw->rtsh", normed[sets], matrix)
        outputs = _wide(without_bias(module, normed.to(_dtype(module))))  # [sets, rows, tokens, out]
        by_head = by_reading_head(self.anatomy, layer, part, outputs.movedim(-1, 0))  # [heads, head_dim, sets, rows, tokens]
        return by_head[heads, :, sets].permute(2, 3, 0, 1)

    def _reads_mlp(self, layer: int, cut: _CutReaders) -> Callable[[Tensor, ForwardContext], Tensor]:
        norm, parallel = self.blocks[layer].mlp_norm, self.blocks[layer].parallel

        def function(h: Tensor, context: ForwardContext) -> Tensor:
            kept = self._of(context)
            kept.check(Site("input", layer))
            stream = kept.streams[layer, "input"]
            if not parallel:
                stream = stream + kept.streams[layer, "attn.output"].to(stream.device)
            moved = self._moved(norm, stream, cut, kept)[0]
            return h + moved.to(h.device, h.dtype)

        return function

    def _reads_last(self, cut: _CutReaders) -> Callable[[Tensor, ForwardContext], Tensor]:
        def function(h: Tensor, context: ForwardContext) -> Tensor:
            new = h + self._corrections(cut, h, self._of(context))[0].to(h.dtype)
            if not torch.is_grad_enabled():  # the pass is over, but its context is not
                self._passes.pop(context.scratch, None)
            return new

        return function

    # ---- arithmetic

    def _moved(self, norm: nn.Module | None, stream: Tensor, cut: _CutReaders, kept: _Pass) -> Tensor:
        """[sets, rows, tokens, width] how much more the norm gives of the corrected streams than of the stream."""
        corrections = self._corrections(cut, stream, kept)
        if norm is None:
            return corrections
        corrected = (stream + corrections).to(stream.dtype)  # [sets, rows, tokens, width]
        normed = norm.forward(corrected.flatten(0, 1)).unflatten(0, corrected.shape[:2])
        return _wide(normed) - _wide(norm.forward(stream))

    def _corrections(self, cut: _CutReaders, stream: Tensor, kept: _Pass) -> Tensor:
        """[sets, rows, tokens, width] what is added to the stream for each set of cut edges."""
        width = self.anatomy.width
        total: Tensor | None = None  # [sets, rows * tokens * width]
        for site, sets in cut.sets.items():
            kept.check(site)
            change = kept.changes[site].to(stream.device)
            of_sets = self.strength * sets.to(change)  # [sets, rows or 1, changes]
            if site.part == "attn.z" and (site.layer or 0) in kept.attended:
                part = self.strength * self._behind_norm(site.layer or 0, _summed(sets.to(change), change), kept).flatten(1)
                total = part if total is None else total + part
            elif sets.shape[1] > 1:
                part = _summed(of_sets, change).flatten(1)
                total = part if total is None else total + part
            else:
                total = of_sets[:, 0] @ change.flatten(1) if total is None else total.addmm_(of_sets[:, 0], change.flatten(1))
        assert total is not None
        return total.unflatten(1, (*stream.shape[:2], width))

    def _behind_norm(self, layer: int, summed: Tensor, kept: _Pass) -> Tensor:
        """[sets, rows, tokens, width] what heads change together behind a norm, where they do not add up. summed: before it."""
        norm = self.anatomy.post_norm(layer, self.anatomy.writer(layer, "attn"))
        assert norm is not None
        attended = kept.attended[layer].to(summed.device)
        mixed = (attended + summed).to(attended.dtype)
        normed = norm.forward(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2])
        return _wide(normed) - _wide(norm.forward(attended))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def _summed(sets: Tensor, change: Tensor) -> Tensor:
    """[sets, rows, tokens, width]. sets: [sets, rows or 1, changes]. change: [changes, rows, tokens, width]."""
    if sets.shape[1] == 1:
        return torch.einsum("sw,wrtd->srtd", sets[:, 0], change)
    return torch.einsum("srw,wrtd->srtd", sets, change)


def _wide(h: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return h if h.dtype == torch.float64 else h.float()


# ---- errors


def _no_such_edge(graph: ComponentGraph, wrong: Tensor) -> ConfigError:
    writer, reader = wrong.nonzero()[0].tolist()
    return ConfigError("an edge to ablate is not in the graph", expected="a writer that comes before the reader",
                       found=f"{graph.writers[writer].name}->{graph.readers[reader].name}",
                       remedy="choose among graph.possible")  # fmt: skip


def _other_recording(site: Site) -> ContextError:
    return ContextError(
        "gradients of ablated edges need writers and readers of one recording",
        expected="a pass that autograd records as a whole, or not at all",
        found=f"one that records what is at '{site}' and not what reads it, or the other way round, as reentrant checkpointing does",
        remedy="model.gradient_checkpointing_enable({'use_reentrant': False})",
    )


def _no_edges() -> ConfigError:
    return ConfigError("there is no edge to ablate", expected="at least one", found="none",
                       remedy="choose edges with scores.top_edges(200)")  # fmt: skip
