"""PassEvents: what an attachment does when a forward pass of its model opens, closes and ends."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from steer.intervene.active import ActiveIntervention
from steer.intervene.gate import SiteGate
from steer.intervene.prepared import PreparedEdits
from steer.intervene.token_counter import TokenCounter
from steer.model.context import ForwardContext
from steer.model.watcher import Watcher

T = TypeVar("T")


class PassEvents:
    """Token masks and prepared edits when a pass opens, token counts when it closes.

    Attributes:
        counter: of steered tokens.
        prepared: edits of decoded tokens.
    """

    def __init__(
        self,
        active: list[ActiveIntervention],
        gates: list[SiteGate],
        counter: TokenCounter,
        prepared: PreparedEdits,
        like: Tensor,
    ) -> None:
        self.counter = counter
        self.prepared = prepared
        self._active = active
        self._gates = [gate for gate in gates if gate.per != "token"]
        self._like = like
        self._types: tuple[torch.dtype, bool] = (like.dtype, False)
        self._watcher: Watcher | None = None
        self._by_key = {intervention.key: intervention for intervention in active}

    def connect(self, watcher: Watcher) -> None:
        """Joins the watcher of the model."""
        self._watcher = watcher
        watcher.on_open.append(self._open)
        watcher.on_close.append(self.counter.close)
        watcher.on_end.append(self.prepared.end)

    def disconnect(self) -> None:
        """Leaves the watcher, and keeps nothing of the model."""
        if self._watcher is not None:  # when it is done again after an interrupt, some are off already
            _drop(self._watcher.on_open, self._open)
            _drop(self._watcher.on_close, self.counter.close)
            _drop(self._watcher.on_end, self.prepared.end)
        self._watcher = None
        self._like = torch.empty(0, dtype=self._like.dtype)

    def windows_moved(self, *, parted: bool) -> None:
        """Windows were moved. parted: some interventions do not act on the same tokens any more."""
        self.counter.regroup()
        if parted:
            self.prepared.regroup()
            self._by_key = {intervention.key: intervention for intervention in self._active}

    def strengths_changed(self) -> None:
        """A strength or a switch was set, or a schedule went on."""
        self.counter.refresh()
        self.prepared.invalidate()

    def rows_about_to_change(self) -> None:
        """Row slots are about to be set."""
        self.counter.flush()
        self.prepared.invalidate()

    def _open(self, ctx: ForwardContext) -> None:
        self.counter.open(ctx)
        if not ctx.tokens:
            return
        for intervention in self._by_key.values():
            intervention.prepare(ctx, self._like.dtype)
        for gate in self._gates:
            gate.note_lengths(ctx)
        decoded = ctx.tokens == 1 and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if decoded and self._watcher is not None and not self._watcher.compiles_blocks():
            types = (self._like.dtype, torch.is_autocast_enabled(self._like.device.type))
            if types != self._types:
                self._types = types
                self.prepared.renew()
            self.prepared.open(ctx)


def _drop(functions: list[T], function: T) -> None:
    if function in functions:
        functions.remove(function)
