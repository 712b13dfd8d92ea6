"""Fast passes of causal tracing: all cells at one token in one batch, which runs only what the cells change.

Below the first layer that a cell touches, and before its token, everything is as in the corrupted run. So the prefix of the token is read
from keys and values that were kept, a cell joins the batch at its own layer with the stream that was kept there, and only the last token
goes through the unembedding. The model is called with one row, from which it makes masks and positions; the blocks get the rows of the
cells, for which both hold alike. Whether a model takes that is seen in a trial, see `steer.edits.tracing.trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.edits.tracing.cells import HIDDEN, SEVERABLE, Cell, site_of
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.prompts import TracedPrompt
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.prefix import lend_rows, replaced_forwards
from steer.model.site import Site

NUMBERS = 2**25  # of logits that are held at a time


class FastPasses:
    """Runs cells of one prompt.

    Args:
        record: with keys and values.
        max_tokens: of a batch, all its rows together.
    """

    def __init__(self, passes: Passes, prompt: TracedPrompt, severed: str | None, record: Record, *, max_tokens: int) -> None:
        self.passes, self.prompt, self.severed, self.record, self.max_tokens = passes, prompt, severed, record, max_tokens
        self.anatomy = passes.anatomy

    def logits(self, cells: Sequence[Cell]) -> Iterator[tuple[list[Cell], Tensor]]:
        """Yields some of the cells, all of one token, with [cells, samples, vocabulary] logits of the last token."""
        n_tokens, vocabulary = len(self.prompt.ids) - cells[0].token, self.record.logits.shape[-1]
        size = max(1, min(self.max_tokens // n_tokens, NUMBERS // vocabulary) // self.record.samples)
        ordered = sorted(cells, key=lambda cell: cell.joins)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            yield batch, _Batch(self, batch).logits()


class _Batch:
    """Cells at one token, in the order in which they join, several rows each: [cells * samples, tokens from that token on].

    Until the first cell joins, the one row that the model was called with runs through the blocks, and is then dropped.
    """

    def __init__(self, fast: FastPasses, cells: Sequence[Cell]) -> None:
        self.passes, self.record, self.severed = fast.passes, fast.record, fast.severed
        self.anatomy, self.cells, self.token = fast.anatomy, cells, cells[0].token
        self.ids = fast.prompt.ids[self.token :]
        self.samples = self.record.samples
        self.live = [sum(cell.joins <= layer for cell in cells) for layer in range(self.anatomy.n_layers)]  # cells in each layer

    def logits(self) -> Tensor:
        """[cells, samples, vocabulary]."""
        prefix = self.record.prefix(self.anatomy, self.token)
        for layer, live in zip(prefix.cache.layers, self.live, strict=True):
            lend_rows(layer, torch.arange(self.samples).repeat(live) if live else torch.zeros(1, dtype=torch.long))
        ids = torch.tensor([self.ids])  # [1, tokens]
        inputs = prefix.continued({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        placed = {name: value.to(self.passes.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        blocks = {block: self._joined(layer, block.forward) for layer, block in enumerate(self.anatomy.blocks)}
        head = self.anatomy.unembedding
        last_token = {head: _of_last_token(head.forward)} if head is not None else {}
        with self.passes.functions_at(self._functions()), replaced_forwards({**blocks, **last_token}):
            logits = self.passes.model(**placed).logits
        return logits[:, -1].unflatten(0, (len(self.cells), self.samples))

    # ---- cells that join

    def _joined(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block, for the rows that are there and those that join."""
        before = self.live[layer - 1] if layer else 0
        joining = self.cells[before : self.live[layer]]

        def join(*args: Any, **kwargs: Any) -> Any:
            if not joining:
                return forward(*args, **kwargs)
            place = _place_of_stream(self.anatomy, args, kwargs)
            stream = args[place] if isinstance(place, int) else kwargs[place]
            rows = self._streams(layer, joining).to(stream)
            joined = torch.cat([stream, rows]) if before else rows
            if isinstance(place, int):
                return forward(*args[:place], joined, *args[place + 1 :], **kwargs)
            return forward(*args, **{**kwargs, place: joined})

        return join

    def _streams(self, layer: int, joining: Sequence[Cell]) -> Tensor:
        """[joining * samples, tokens, width] inputs of a block, as in the corrupted runs but where a cell restores the stream itself."""
        kept = self.record.values[Site("input", layer)]
        streams = kept[None, 1:, self.token :].repeat(len(joining), 1, 1, 1)  # [joining, samples, tokens, width]
        for number, cell in enumerate(joining):
            if cell.kind == HIDDEN:
                streams[number, :, 0] = kept[0, self.token]
        return streams.flatten(0, 1)

    # ---- parts that are restored or severed

    def _functions(self) -> dict[Site, HookFunction]:
        functions: dict[Site, HookFunction] = {}
        for layer, live in enumerate(self.live):
            for kind in SEVERABLE if live else ():
                restored = [number for number, cell in enumerate(self.cells[:live]) if cell.kind == kind and layer in cell.layers]
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
    """The unembedding of the last of the tokens that it is called with."""
    return lambda hidden: forward(hidden[:, -1:])
