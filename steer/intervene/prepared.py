"""Prepared edits: what every site does to a decoded token, worked out for all sites together when the pass opens.

Between two sites the weights of a block go through the caches, so that every further operation, and every Python frame, at a site costs
three to six times what it costs in a hot loop. Most of an edit is the same for every token until a strength, a vector or the row slots
change: strength x vector for an addition, the two vectors of a rank-one edit, the strength of any other edit that is linear in it. These
are stacked over the sites of a plan that act on the same tokens, multiplied with the token mask in one operation a pass, and handed to the
hooks as views. Only without gradients, since the views share one history; and compiled code has its own ways.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.intervene.low_rank import LinearLowRank, LowRank, with_norm_of
from steer.intervene.operator import RowTensors, is_current, tensors_of_rows
from steer.model.context import ForwardContext

if TYPE_CHECKING:
    from steer.intervene.active import ActiveIntervention

_UNCHECKED = object()
_VERSION = attrgetter("_version")
LARGEST = 1 << 24  # numbers stacked for one group, 64 MiB in fp32: many rows at many wide sites take the ordinary way


class PreparedEdit:
    """The edit of one site for the pass that runs.

    Attributes:
        group: whose parts are stacked with this one's; `group.live` says whether the edit holds for the pass that runs.
        fits: the `group.live` for which an activation of this site had the right shape and type; a hook then need not look again.
        is_plain_add: the edit is `h + folded` and nothing else.
        idle: no token of this pass is meant.
        shape, dtype: of the activation that it fits.
        folded: [batch, 1, width or 1] the part that has the mask multiplied in.
    """

    def __init__(self, active: ActiveIntervention, dtype: torch.dtype) -> None:
        self.active = active
        self.dtype = dtype
        self.group = PreparedGroup([self])
        self.fits: object = _UNCHECKED
        self.idle = False
        self.shape: torch.Size | None = None
        self.folded = torch.empty(0)
        self.preserve_norm = active.preserve_norm
        self.is_plain_add = active.operator.additive and not active.preserve_norm and active.gate is None
        self.widens = self.needs_fp32(active) and dtype is not torch.float32

    @staticmethod
    def needs_fp32(active: ActiveIntervention) -> bool:
        """It is worked out in fp32 whatever the dtype of the activation."""
        return True

    def stacked_part(self, strength: Tensor, per_row: RowTensors) -> Tensor:
        """What is stacked and multiplied with the mask, [batch or 1, 1, width or 1] fp32; keeps what it needs besides.

        Args:
            strength: [batch or 1, 1, 1].
            per_row: tensors of each row of the batch.
        """
        raise NotImplementedError

    def edit(self, h: Tensor, opened: Tensor | None) -> Tensor:
        """The edited activation. h: [batch, 1, width]; opened: [batch, 1, 1] how far a gate is open, None without one."""
        raise NotImplementedError

    def __call__(self, h: Tensor, opened: Tensor | None = None) -> Tensor | None:
        """The edited activation, h itself where no token is meant, None where this tensor has to take the ordinary way."""
        if h.shape != self.shape or h.dtype is not self.dtype:
            return h if self.idle else None
        self.fits = self.group.live
        return self.edited(h, opened)

    def edited(self, h: Tensor, opened: Tensor | None = None) -> Tensor:
        """The edited activation, of a shape and type that were looked at."""
        wide = h.float() if self.widens else h
        edited = self.edit(wide, opened)
        if self.preserve_norm:
            edited = with_norm_of(wide, edited)
        return edited.to(h.dtype) if self.widens else edited


class PreparedAdd(PreparedEdit):
    """h + strength * mask * vector."""

    @staticmethod
    def needs_fp32(active: ActiveIntervention) -> bool:
        return active.preserve_norm

    def stacked_part(self, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * per_row["vector"].unsqueeze(1)

    def edit(self, h: Tensor, opened: Tensor | None) -> Tensor:
        return h + self.folded if opened is None else torch.addcmul(h, opened, self.folded)


class PreparedRankOne(PreparedEdit):
    """h + (h·r) w with w = strength * mask * factor * the vector written: ablation, scaling, replacement."""

    def stacked_part(self, strength: Tensor, per_row: RowTensors) -> Tensor:
        operator = self.active.operator
        assert isinstance(operator, LinearLowRank)
        self.read, write = operator.read_and_write(per_row)  # [batch or 1, 1, width]
        return strength * operator.factor(per_row) * write

    def edit(self, h: Tensor, opened: Tensor | None) -> Tensor:
        coordinate = (h * self.read).sum(-1, keepdim=True)  # [batch, 1, 1]
        return torch.addcmul(h, coordinate if opened is None else coordinate * opened, self.folded)


class PreparedCoordinate(PreparedEdit):
    """h + c(h·r) w with any change c of one coordinate that is linear in the strength: clamping, projection on a target, erasure."""

    def stacked_part(self, strength: Tensor, per_row: RowTensors) -> Tensor:
        operator = self.active.operator
        assert isinstance(operator, LowRank)
        self.change = operator.change
        self.per_row = per_row
        self.read, self.write = operator.read_and_write(per_row)  # [batch or 1, 1, width]
        return strength

    def edit(self, h: Tensor, opened: Tensor | None) -> Tensor:
        change = self.change((h * self.read).sum(-1, keepdim=True), self.folded, self.per_row)  # [batch, 1, 1]
        return torch.addcmul(h, change if opened is None else change * opened, self.write)


class PreparedStrength(PreparedEdit):
    """Any other edit that is linear in its strength: the mask is multiplied into that."""

    def stacked_part(self, strength: Tensor, per_row: RowTensors) -> Tensor:
        self.per_row = per_row
        return strength

    def edit(self, h: Tensor, opened: Tensor | None) -> Tensor:
        return self.active.operator.apply(h, self.folded, opened, self.per_row)


def prepared_for(active: ActiveIntervention, dtype: torch.dtype) -> PreparedEdit | None:
    """A prepared edit of the kind that an intervention allows; None when everything depends on the token."""
    operator = active.operator
    if (
        active.counts_in_calls
        or operator.reads_at is not None
        or not operator.linear_in_strength
        or dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        return None
    if operator.additive:
        return PreparedAdd(active, dtype)
    kind = type(operator)
    reads_one = isinstance(operator, LowRank) and all(rows.shape[1] == 1 for rows in operator.read_and_write(operator.tensors))
    if not reads_one or not is_current(kind, "change", "apply"):
        return PreparedStrength(active, dtype)
    is_multiple = isinstance(operator, LinearLowRank) and is_current(kind, "factor", "change", "apply")
    return (PreparedRankOne if is_multiple else PreparedCoordinate)(active, dtype)


class PreparedGroup:
    """Prepared edits whose parts are stacked, since they act on the same tokens and are equally wide.

    Attributes:
        edits: one for each intervention.
        live: None when they do not hold for the pass that runs; else an object that is another one whenever shapes or types may differ.
        stale: a strength or the row slots changed since the parts were stacked.
    """

    def __init__(self, edits: list[PreparedEdit]) -> None:
        self.edits = edits
        self.live: object | None = None
        self.stale = True
        self._token = object()
        self._first = edits[0].active
        self._tensors = [tensor for edit in edits for tensor in edit.active.operator.tensors.values()]
        self._versions = -1  # summed over the tensors, each of which only grows
        self._stacked = torch.empty(0)  # [interventions, batch or 1, 1, width or 1]
        self._folded = torch.empty(0)  # [interventions, batch, 1, width or 1] the same with the mask multiplied in
        self._batch = -1  # that they are for
        self._shown: Tensor | None = None  # of the two, the one that the edits hold views of
        # optimisers that write past the version counter exist (fused 8-bit ones, .data): what is learned is stacked in every pass
        self._learns = any(edit.active.operator.parameters for edit in edits)

    def renew(self) -> None:
        """Shapes or types of activations may differ from those that were looked at."""
        self._token = object()

    def open(self, ctx: ForwardContext) -> object | None:
        """Prepares the edits for a pass of one token a row. Returns what `live` becomes, None when this pass takes the ordinary way."""
        mask = self._first.tokens(ctx)
        if mask is False:
            self._set_idle()
            return self._token
        if self._learns or self.stale or self._batch != ctx.batch or sum(map(_VERSION, self._tensors)) != self._versions:
            if not self._stack(ctx):
                return None
        weight = ctx.scratch.weights.get(self._first.key)  # [batch, 1, 1]
        if weight is None:
            self._show(self._stacked)
        elif weight.device == self._stacked.device:
            torch.mul(self._stacked, weight, out=self._folded)
            self._show(self._folded)
        else:
            return None  # the model lies on several devices
        return self._token

    def _stack(self, ctx: ForwardContext) -> bool:
        parts = []
        for edit in self.edits:
            active = edit.active
            rows = active.rows_of(ctx, ctx.batch) if active.slots > 1 else None
            strength = active.strength if rows is None or active.strength.shape[0] == 1 else active.strength[rows]
            parts.append(edit.stacked_part(strength, tensors_of_rows(active.operator.tensors, rows)))
        if len(parts) * ctx.batch * parts[0].shape[-1] > LARGEST:
            return False
        first = self.edits[0]
        dtype = torch.float32 if first.needs_fp32(first.active) else first.dtype
        n_rows = max(part.shape[0] for part in parts)
        with torch.inference_mode(False):
            self._stacked = torch.stack([part.expand(n_rows, -1, -1) for part in parts]).to(dtype)
            self._folded = self._stacked.new_empty(len(parts), ctx.batch, *self._stacked.shape[2:])
        self._batch = ctx.batch
        self._shown = None
        self._versions = sum(map(_VERSION, self._tensors))
        self.stale = False
        return True

    def _show(self, parts: Tensor) -> None:
        """Gives every edit its view of the parts; done again only when these lie elsewhere."""
        if self._shown is parts:
            return
        self.renew()
        for edit, part in zip(self.edits, parts.unbind(), strict=True):
            edit.folded = part
            edit.shape = torch.Size((self._batch, 1, edit.active.operator.width))
            edit.idle = False
        self._shown = parts

    def _set_idle(self) -> None:
        self._shown = None
        self.renew()
        for edit in self.edits:
            edit.shape = None
            edit.idle = True


class PreparedEdits:
    """All prepared edits of an attachment, which it opens and ends with each pass."""

    def __init__(self, active: list[ActiveIntervention]) -> None:
        self._edits = [intervention.prepared for intervention in active if intervention.prepared is not None]
        self._groups: list[PreparedGroup] = []
        self.regroup()

    def regroup(self) -> None:
        """Puts those together that act on the same tokens, which changes when a window moves."""
        groups: dict[tuple[object, ...], list[PreparedEdit]] = {}
        for edit in self._edits:
            active = edit.active
            shape = (active.operator.width, edit.dtype, active.strength.device, active.slots > 1)
            groups.setdefault((active.key, type(edit), active.preserve_norm, *shape), []).append(edit)
        self._groups = [PreparedGroup(edits) for edits in groups.values()]
        for group in self._groups:
            for edit in group.edits:
                edit.group = group

    def invalidate(self) -> None:
        """A strength or the row slots changed."""
        for group in self._groups:
            group.stale = True

    def open(self, ctx: ForwardContext) -> None:
        """Prepares the edits of a pass of one token a row, without gradients, once its token masks are known."""
        for group in self._groups:
            group.live = group.open(ctx)

    def renew(self) -> None:
        """Activations may have other types from now on."""
        for group in self._groups:
            group.renew()

    def end(self) -> None:
        """The pass is over, or failed: no edit holds any more."""
        for group in self._groups:
            group.live = None
