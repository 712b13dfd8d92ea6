"""TokenCounter: on how many tokens each intervention of an attachment acted.

Counts are added up lazily: a pass leaves a number or a mask behind, and sums are taken when there are many of them, when a strength or the
row slots change, or when somebody asks. Sites of a decoder are reached in every pass (the watcher proves it), so they are counted once per
pass and set of tokens. Any other module may be left out of a pass, and a gate at the unembedding decides when the decoder is left: those
are counted where they happen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.intervene.active import ActiveIntervention
from steer.model.context import ForwardContext

MOST_PENDING = 64  # masks of decoded tokens that wait to be added up


class _CounterGroup:
    """Interventions that act on the same tokens.

    Attributes:
        members: the interventions; one alone where a gate or a module of unknown role decides.
        counts: [members] tokens counted so far.
        live: [members, 1 or slots] strengths other than 0, in place, so that compiled code sees them change.
    """

    def __init__(self, members: list[ActiveIntervention], counts: list[int], device: torch.device) -> None:
        self.members = members
        self.first = members[0]
        self.has_slots = self.first.slots > 1
        with torch.inference_mode(False):
            self.counts = torch.tensor(counts, dtype=torch.long, device=device)
            slots = max(member.slots for member in members)
            self.live = torch.zeros(len(members), slots, dtype=torch.bool, device=device)
        self._live_pattern: list[list[bool]] = []
        self._tokens = 0  # of passes whose masks are constants: of all rows, or where there are row slots of each row
        self._rows_of_tokens: Tensor | None = None  # [batch] row slots in those passes
        self._pending: list[Tensor] = []  # [batch, 1] masks of decoded tokens, all of one batch
        self._pending_rows: Tensor | None = None  # [batch] row slots of that batch
        self._pending_opened: list[Tensor] = []  # [batch, 1, 1] how far a gate was open on decoded tokens
        self.refresh()

    def refresh(self) -> None:
        """Notes which interventions have a strength other than 0."""
        slots = self.live.shape[1]
        pattern = [member.live_slots * (slots // len(member.live_slots)) for member in self.members]
        if pattern != self._live_pattern:
            self.flush()
            self._live_pattern = pattern
            self.live.copy_(torch.tensor(pattern))

    def move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.counts = self.counts.to(device)
            self.live = self.live.to(device)

    def add(self, ctx: ForwardContext) -> None:
        """Counts the tokens of a pass that is over, or of a call of a module."""
        if self.first.gate is not None and self._waits_for_gate(ctx):
            return
        mask = self.first.acting(ctx)
        if mask is False:
            return
        if mask is True and not torch.compiler.is_compiling():
            self._add_every_token(ctx)
            return
        if mask is True:
            mask = torch.ones(max(ctx.batch, 1), max(ctx.tokens, 1), dtype=torch.bool, device=self.counts.device)
        rows = self.first.rows_of(ctx, mask.shape[0]) if self.has_slots else None
        if torch.compiler.is_compiling() or mask.shape[1] > 1:
            self._add_up(mask.sum(1), rows)
            return
        if self._pending and self._pending[0].shape != mask.shape:
            self.flush()
        self._pending.append(mask)
        self._pending_rows = rows
        if len(self._pending) >= MOST_PENDING:
            self.flush()

    def _waits_for_gate(self, ctx: ForwardContext) -> bool:
        """Leaves what a gate said of decoded tokens, to be compared later with that of other passes in one operation."""
        first = self.first
        assert first.gate is not None
        if ctx.tokens != 1 or self.has_slots or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if first.tokens(ctx) is not True:
            return False
        opened = first.gate.opened(ctx, first.decisions)  # [batch or 1, 1, 1]
        if opened.shape[0] != ctx.batch or self._pending_opened and self._pending_opened[0].shape != opened.shape:
            return False
        self._pending_opened.append(opened)
        if len(self._pending_opened) >= MOST_PENDING:
            self.flush()
        return True

    def _add_every_token(self, ctx: ForwardContext) -> None:
        batch = max(ctx.batch, 1)
        if self.has_slots:
            rows = self.first.rows_of(ctx, batch)
            if rows is not self._rows_of_tokens:
                self.flush()
                self._rows_of_tokens = rows
            batch = 1  # tokens are counted per row
        self._tokens += batch * max(ctx.tokens, 1)

    def _add_up(self, row_tokens: Tensor, rows: Tensor | None) -> None:
        """row_tokens: [batch] tokens of each row; rows: [batch] their row slots, None when all rows share one."""
        if rows is None:
            self.counts.add_(self.live[:, 0] * row_tokens.sum())
        else:
            self.counts.add_((self.live[:, rows.to(self.live.device)] * row_tokens).sum(1))

    def flush(self) -> None:
        """Adds up what waits; to be called before the row slots change, or what is live."""
        if self._pending:
            self._add_up(torch.stack(self._pending).sum((0, 2)), self._pending_rows)
            self._pending = []
        if self._pending_opened:
            self.counts.add_(self.live[:, 0] * (torch.stack(self._pending_opened) > 0.5).sum().to(self.counts.device))
            self._pending_opened = []
        if self._tokens:
            live = self.live[:, 0] if self._rows_of_tokens is None else self.live[:, self._rows_of_tokens.to(self.live.device)].sum(1)
            self.counts.add_(live * self._tokens)
            self._tokens = 0


class TokenCounter:
    """Counts steered tokens, and the passes that went through an attachment.

    Attributes:
        reached: a pass went through.
    """

    def __init__(self, active: list[ActiveIntervention], device: torch.device) -> None:
        self.reached = False
        self._device = device
        self._eager_passes = 0
        with torch.inference_mode(False):
            self._compiled_passes = torch.zeros((), dtype=torch.long, device=device)
        self._active = active
        self._groups: list[_CounterGroup] = []
        self._counted_at_close: list[_CounterGroup] = []
        self.regroup()

    def regroup(self) -> None:
        """Puts those together that act on the same tokens, which changes when a window moves; what was counted stays."""
        groups: dict[object, list[ActiveIntervention]] = {}
        for active in self._active:
            alone = active.site.module is not None or active.gate is not None
            groups.setdefault(active.name if alone else (active.key, active.slots), []).append(active)
        if [group.members for group in self._groups] == list(groups.values()):
            return
        counted = self.read()
        self._groups = [
            _CounterGroup(members, [counted.get(member.name, 0) for member in members], self._device) for members in groups.values()
        ]
        self._counted_at_close = [group for group in self._groups if not group.first.counts_in_calls]

    def refresh(self) -> None:
        """Strengths changed."""
        for group in self._groups:
            group.refresh()

    def flush(self) -> None:
        """Adds up what waits, before the row slots change."""
        for group in self._groups:
            group.flush()

    def open(self, ctx: ForwardContext) -> None:
        """A pass begins; the model may have been moved since the attach."""
        self.reached = True
        if ctx.device is not None and ctx.device != self._device:
            self._device = ctx.device
            for group in self._groups:
                group.move(ctx.device)
            with torch.inference_mode(False):
                self._compiled_passes = self._compiled_passes.to(ctx.device)

    def close(self, ctx: ForwardContext) -> None:
        """A pass of the decoder is over."""
        if torch.compiler.is_compiling():
            self._compiled_passes.add_(1)
        else:
            self._eager_passes += 1
        for group in self._counted_at_close:
            group.add(ctx)

    def called(self, active: list[ActiveIntervention], ctx: ForwardContext) -> None:
        """A site was reached whose interventions are counted where they happen."""
        self.reached = True
        for group in self._groups:
            if any(group.first is intervention for intervention in active):
                group.add(ctx)

    @property
    def passes(self) -> int:
        """Passes so far."""
        return self._eager_passes + int(self._compiled_passes)

    def read(self) -> dict[str, int]:
        """Tokens so far, by name of the intervention."""
        self.flush()
        return {member.name: count for group in self._groups for member, count in zip(group.members, group.counts.tolist(), strict=True)}
