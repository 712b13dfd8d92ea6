"""Fast passes of causal tracing: all cells at one token in one batch, which runs only what the cells change.

Below the first layer that a cell touches, and before its token, everything is as in the corrupted run. So the prefix of the token is read
from keys and values that were kept, a cell joins the batch at its own layer with the stream that was kept there (or with that of a cell
which was the same until then), and only the last token goes through what only it is needed of. The model is called with one row, from
which it makes masks and positions; the blocks get the rows of the cells, for which both hold alike. Whether a model takes that is seen in a
trial, see `steer.edits.tracing.trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steer.edits.tracing.cells import HIDDEN, MLP, SEVERABLE, Cell, site_of
from steer.edits.tracing.joining import Joining, joinings
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.prompts import TracedPrompt
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.memory import in_halves
from steer.model.prefix import lend_rows, replaced_forwards
from steer.model.site import Site

NUMBERS = 2**25  # of logits that are held at a time


class FastPasses:
    """Runs cells of one prompt.

    Args:
        record: with keys and values.
        max_tokens: of a batch, all its rows together; one that does not fit into memory is halved.
    """

    def __init__(self, passes: Passes, prompt: TracedPrompt, severed: str | None, record: Record, *, max_tokens: int) -> None:
        self.passes, self.prompt, self.severed, self.record, self.max_tokens = passes, prompt, severed, record, max_tokens
        self.n_layers = passes.anatomy.n_layers

    def logits(self, cells: Sequence[Cell]) -> Iterator[tuple[list[Cell], Tensor]]:
        """Yields some of the cells, all of one token, with [cells, samples, vocabulary] logits of the last token."""
        n_tokens, vocabulary = len(self.prompt.ids) - cells[0].token, self.record.logits.shape[-1]
        size = max(1, min(self.max_tokens // n_tokens, NUMBERS // vocabulary) // self.record.samples)
        ordered = sorted(cells, key=lambda cell: cell.joins)
        for start in range(0, len(ordered), size):
            for _, found in in_halves(ordered[start : start + size], self._batch):
                yield found

    def _batch(self, cells: Sequence[Cell]) -> tuple[list[Cell], Tensor]:
        batch = _Batch(self, joinings(cells, self.n_layers))
        return [joining.cell for joining in batch.joinings], batch.logits()


class _Batch:
    """Cells at one token, several rows each: [cells * samples, tokens from that token on].

    Until the first cell joins, the one row that the model was called with runs through the blocks, and is then dropped.
    """

    def __init__(self, fast: FastPasses, joinings: list[Joining]) -> None:
        self.passes, self.record, self.severed, self.joinings = fast.passes, fast.record, fast.severed, joinings
        self.anatomy, self.n_layers, self.samples = fast.passes.anatomy, fast.n_layers, fast.record.samples
        self.token = joinings[0].cell.token
        self.ids = fast.prompt.ids[self.token :]
        self.live = [sum(joining.layer <= layer for joining in joinings) for layer in range(self.n_layers)]  # cells in each layer

    def logits(self) -> Tensor:
        """[cells, samples, vocabulary]."""
        prefix = self.record.prefix(self.anatomy, self.token)
        for layer, live in zip(prefix.cache.layers, self.live, strict=True):
            lend_rows(layer, torch.arange(self.samples).repeat(live) if live else torch.zeros(1, dtype=torch.long))
        ids = torch.tensor([self.ids])  # [1, tokens]
        inputs = prefix.continued({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        placed = {name: value.to(self.passes.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        forwards = {block: self._joined(layer, block.forward) for layer, block in enumerate(self.anatomy.blocks)}
        forwards |= self._for_last_token()
        with self.passes.functions_at(self._functions()), replaced_forwards(forwards):
            logits = self.passes.model(**placed).logits
        of_cells = logits[:, -1].unflatten(0, (self.live[-1], self.samples))
        same = [joining.like for joining in self.joinings[self.live[-1] :]]  # as another one to the last block
        return torch.cat([of_cells, of_cells[same]]) if same else of_cells

    def _for_last_token(self) -> dict[nn.Module, Callable[..., Any]]:
        """The forwards of what nothing is read of but its output at the last token: the last MLP, and the unembedding."""
        unembedding, mlp = self.anatomy.unembedding, self.anatomy.parts[-1].mlp()
        assert unembedding is not None
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        if len(mlp) == 1 and not mlp[0].mixes:
            module = self.anatomy.module_in_block(self.n_layers - 1, mlp[0].part)
            forwards[module] = _of_last_token(module.forward)
        forward = unembedding.forward
        return {**forwards, unembedding: lambda hidden: forward(hidden[:, -1:])}

    # ---- cells that join

    def _joined(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block, for the rows that are there and those that join."""
        before = self.live[layer - 1] if layer else 0
        joining = self.joinings[before : self.live[layer]]

        def join(*args: Any, **kwargs: Any) -> Any:
            if not joining:
                return forward(*args, **kwargs)
            place = _place_of_stream(self.anatomy, args, kwargs)
            stream = args[place] if isinstance(place, int) else kwargs[place]
            rows = [self._stream(layer, each, stream).to(stream) for each in joining]
            joined = torch.cat([stream, *rows] if before else rows)
            if isinstance(place, int):
                return forward(*args[:place], joined, *args[place + 1 :], **kwargs)
            return forward(*args, **{**kwargs, place: joined})

        return join

    def _stream(self, layer: int, joining: Joining, stream: Tensor) -> Tensor:
        """[samples, tokens, width] input of a block for a cell that joins there. stream: of those that are there already."""
        cell, token = joining.cell, self.token
        if joining.like is not None:
            return stream[joining.like * self.samples : (joining.like + 1) * self.samples]
        kept = self.record.values[Site("input", layer)]
        rows = kept[1:, token:].clone()
        if cell.kind == HIDDEN:
            rows[:, 0] = kept[0, token]
        elif cell.kind == MLP and layer > cell.layers.start:
            written = self.record.values[site_of(MLP, layer - 1)][:, token]  # [1 + samples, width]
            rows[:, 0] += written[0] - written[1:]
        return rows

    # ---- parts that are restored or severed

    def _functions(self) -> dict[Site, HookFunction]:
        functions: dict[Site, HookFunction] = {}
        for layer, live in enumerate(self.live):
            cells = [joining.cell for joining in self.joinings[:live]]
            for kind in SEVERABLE if live else ():
                restored = [number for number, cell in enumerate(cells) if cell.kind == kind and layer in cell.layers]
                site = site_of(kind, layer)
                if restored or kind == self.severed:
                    functions[site] = self._changed(site, restored, live, is_severed=kind == self.severed)
        return functions

    def _changed(self, site: Site, restored: list[int], live: int, *, is_severed: bool) -> HookFunction:
        """At the token of the cells: the clean value in some of them, or the corrupted ones in all of them."""
        of_token = self.record.values[site][:, self.token]  # [1 + samples, width]

        def change(h: Tensor, context: ForwardContext) -> Tensor:
            changed = h.clone(memory_format=torch.contiguous_format)
            by_cell = changed.view(live, self.samples, len(self.ids), -1)  # some blocks put all tokens of a batch on one axis
            if is_severed:
                by_cell[:, :, 0] = of_token[1:].to(h.device)
            else:
                by_cell[restored, :, 0] = of_token[0].to(h.device)
            return changed

        return change


def _place_of_stream(anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where a block is given the residual stream."""
    argument = anatomy.stack.argument
    if isinstance(argument, str) and argument in kwargs:
        return argument
    return argument if isinstance(argument, int) and argument < len(args) else 0 if args else "hidden_states"


def _of_last_token(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module that works on each token alone, for the last token; the others get zeros, which nobody looks at."""

    def of_last_token(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or args[0].dim() != 3:
            return forward(*args, **kwargs)
        output = forward(args[0][:, -1:])
        return pad(output, (0, 0, args[0].shape[1] - 1, 0)) if isinstance(output, Tensor) else forward(*args)

    return of_last_token
