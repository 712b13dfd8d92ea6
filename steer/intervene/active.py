"""ActiveIntervention: an intervention on one model, with the tensors and switches that drive its hook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.intervene.intervention import Intervention, width_error
from steer.intervene.low_rank import widened, with_norm_of
from steer.intervene.operator import tensors_of_rows
from steer.intervene.prepared import PreparedEdit
from steer.intervene.schedule import Schedule, check_product, factor_at
from steer.intervene.scope_mask import ScopeMask, both
from steer.kernels.dispatch import wanted
from steer.model.context import ForwardContext, Mask


class ActiveIntervention:
    """One intervention of an attachment.

    Attributes:
        description: the intervention as it is written down.
        base: strength of each row slot as it was set, before schedule and switch.
        live_slots: whether the strength of each row slot is other than 0, known without asking the device.
        strength: [1 or slots, 1, 1] base x schedule x switch, the buffer that the hook reads.
        slots: number of row slots; 1 when every row is treated alike.
        rows: [batch] row slot of each row of the next batches, or None.
        scope_mask: finds its tokens; shared with the interventions of the attachment that name the same tokens.
        key: names its set of tokens; interventions with the same key act on the same ones.
        decisions: names under which the parts of its gate leave their decisions in a pass.
        reading: name of the earlier activation that its edit depends on in a pass; None for one that depends on none.
        prepared: the edit of a decoded token, worked out when its pass opens; None where that cannot be done.
    """

    def __init__(
        self,
        description: Intervention,
        scope_mask: ScopeMask,
        device: torch.device,
        plan_number: int,
        *,
        phases: tuple[str, ...],
        schedule: Schedule,
    ) -> None:
        self.description = description
        self.name = description.name
        self.site = description.single_site
        self.operator = description.operator.on(device)
        self.gate = description.gate
        self.preserve_norm = description.preserve_norm
        self.slots = description.slots
        self.phases = phases
        self.roles = description.roles
        self.schedule = schedule
        self.enabled = description.enabled
        self.base = description.strength
        self.live_slots = [bool(base) for base in self.base]
        with torch.inference_mode(False):  # it is written to when training follows
            self.strength = torch.tensor(self.base, device=device).view(-1, 1, 1)
        self._written: tuple[tuple[float, ...], float] = (self.base, 1.0)  # base and factor that the buffer holds
        self.rows: Tensor | None = None
        self.decisions: tuple[str, ...] = ()
        self.reading: str | None = None
        self.prepared: PreparedEdit | None = None
        self._plan_number = plan_number
        self.share(scope_mask, str(description.scope))

    def __repr__(self) -> str:
        strength = ", ".join(f"{base:.4g}" for base in self.base[:4])
        return f"ActiveIntervention('{self.name}' at {self.site}, strength {strength}, {'on' if self.enabled else 'off'})"

    # ---- driving

    def share(self, scope_mask: ScopeMask, tokens_name: str) -> None:
        """Uses a scope mask, perhaps together with others. tokens_name: names its set of tokens among those of the attachment."""
        self.scope_mask = scope_mask
        self.key = f"plan {self._plan_number}: {tokens_name} in {self.phases} for {self.roles}"

    def set_base(self, base: Sequence[float]) -> None:
        """Sets the strength before schedule and switch; one number stands for every row slot."""
        self.base = tuple(base) if len(base) == len(self.base) else tuple(base) * len(self.base)

    def factor(self, step: int, base: Sequence[float] | None = None) -> float:
        """Schedule x switch at an optimiser step. Raises as `factor_at`, and NonFiniteError when the strength would be beyond fp32.

        Args:
            base: the strengths that are about to be set; those that are when None.
        """
        factor = factor_at(self.schedule, step, self.name) if self.enabled else 0.0
        check_product(self.base if base is None else base, factor, self.name)
        return factor

    def write_strength(self, factor: float) -> None:
        """Writes strength x factor into the buffer that the hook reads; in place, so that compiled code sees it."""
        if (self.base, factor) == self._written:
            return
        self._written = (self.base, factor)
        self.live_slots = [bool(base * factor) for base in self.base]
        self.strength.copy_((torch.tensor(self.base) * factor).view(-1, 1, 1))

    def set_rows(self, rows: Tensor) -> None:
        """Says which row slot each row of the next batches uses; in place where it can be, so that compiled code sees it. rows: [batch]."""
        with torch.inference_mode(False):
            rows = rows.to(self.strength.device)
            if self.rows is None or self.rows.shape != rows.shape:
                self.rows = rows.clone()
            self.rows.copy_(rows)

    def move(self, device: torch.device) -> None:
        """Puts every tensor on a device; outside inference mode, since training may follow a validation run."""
        with torch.inference_mode(False):
            self.operator = self.description.operator.on(device)
            self.strength = self.strength.to(device)
            self.rows = None if self.rows is None else self.rows.to(device)

    @property
    def counts_in_calls(self) -> bool:
        """Whether it acts is not known by the end of the decoder's pass."""
        return self.site.module is not None or self.gate is not None and self.site.part == "logits"

    # ---- which tokens

    def tokens(self, ctx: ForwardContext) -> Mask:
        """The tokens meant in this pass, [batch, tokens] bool or a constant; the same for all interventions with this `key`."""
        mask = ctx.scratch.masks.get(self.key)
        if mask is None:
            acts = ctx.phase in self.phases and ctx.role in self.roles
            if acts and ctx.prompt_phase is not None and ctx.prompt_phase not in self.phases:
                raise _prompt_in_other_phase(self.name, self.phases, ctx.prompt_phase)
            mask = ctx.scratch.masks[self.key] = self.scope_mask.mask(ctx) if acts else False
        return mask

    def prepare(self, ctx: ForwardContext, dtype: torch.dtype) -> None:
        """Works the tokens out when a pass opens: static caches count on while it runs, and sites need them ready."""
        scratch = ctx.scratch
        if self.key in scratch.masks:
            return
        if ctx.phase in self.phases and ctx.role in self.roles:
            self.scope_mask.note_lengths(ctx)
        mask = self.tokens(ctx)
        if mask is False:
            return
        fade = self.scope_mask.fade(ctx)
        if fade is not None or isinstance(mask, Tensor):
            scratch.weights[self.key] = _faded(mask, fade).to(dtype)

    def weight(self, mask: Mask, h: Tensor, ctx: ForwardContext) -> Tensor | None:
        """[batch, tokens or 1, 1] from 0 to 1 in the dtype of h: scope, decay and gate; None for 1 everywhere."""
        weight = self._scope_weight(mask, h, ctx)
        if self.gate is None:
            return weight
        opened = self.opened_at(h, ctx)
        return opened if weight is None else weight * opened

    def opened_at(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """[batch, tokens or 1, 1] in the dtype of h: how far its gate is open on the tokens that this site sees."""
        assert self.gate is not None
        opened = self.gate.opened(ctx, self.decisions)
        if opened.device != h.device or opened.dtype is not h.dtype:
            opened = opened.to(h.device, h.dtype)
        if opened.shape[1] not in (1, h.shape[1]):  # the unembedding may get the last tokens only
            opened = ctx.at_unembedded(opened, h.shape[1])
        return opened

    def _scope_weight(self, mask: Mask, h: Tensor, ctx: ForwardContext) -> Tensor | None:
        """[batch, tokens, 1]: the mask on the tokens that this site sees, faded by the decay; None for 1 everywhere."""
        weight = ctx.scratch.weights.get(self.key)
        if weight is not None and weight.dtype is h.dtype and weight.shape[:-1] == h.shape[:-1]:
            return weight.to(h.device)  # a model may lie on several
        fade = self.scope_mask.fade(ctx)
        if fade is None and mask is True:
            return None
        weight = _faded(mask, fade)
        if weight.shape[:-1] != h.shape[:-1] and self.site.part == "logits" and h.dim() == 3:
            weight = ctx.at_unembedded(weight, h.shape[1])  # the unembedding may get the last tokens only
        if weight.shape[:-1] != h.shape[:-1]:
            raise _no_activation_per_token(str(self.site), weight.shape[:-1], h)
        return weight.to(h.device, h.dtype)

    def acting(self, ctx: ForwardContext) -> Mask:
        """The tokens of its scope on which its gate is more open than not, [batch, tokens] bool or a constant. Read when a pass is over."""
        mask = self.tokens(ctx)
        if mask is False or self.gate is None or not ctx.tokens:
            return mask
        with torch.no_grad():
            opened = (self.gate.opened(ctx, self.decisions) > 0.5).squeeze(-1).to(ctx.device)
        if opened.shape[1] not in (1, ctx.tokens) and isinstance(mask, Tensor):  # the unembedding may get the last tokens only
            mask = ctx.at_unembedded(mask, opened.shape[1])
        return both(mask, opened.expand(ctx.batch, ctx.tokens if opened.shape[1] == 1 else -1))

    def rows_of(self, ctx: ForwardContext, batch: int) -> Tensor:
        """Row slot of each row of this pass, [batch]; beams and returned sequences follow their prompt's row."""
        rows = self.rows
        if rows is None:
            raise _unknown_rows(self.name, self.slots)
        known = rows.shape[0]
        if known == batch:
            return rows
        if ctx.phase == "generate" and known and batch % known == 0:
            return rows.repeat_interleave(batch // known)
        raise _unfitting_rows(self.name, batch, known)

    # ---- the edit

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """Edited activation, or `h` itself when no token of this pass is meant. h: [batch, tokens, width]."""
        prepared = self.prepared
        if prepared is not None and not torch.compiler.is_compiling() and prepared.group.live is not None:
            edited = prepared(h, None if self.gate is None else self.opened_at(h, ctx))
            if edited is not None:
                return edited
        mask = self.tokens(ctx)
        if mask is False:
            return h
        if self.strength.device != h.device:
            self.move(h.device)
        if h.shape[-1] != self.operator.width:
            raise width_error(self.description, h.shape[-1])
        rows = self.rows_of(ctx, h.shape[0]) if self.slots > 1 else None
        strength = self.strength if rows is None or self.strength.shape[0] == 1 else self.strength[rows]  # [batch or 1, 1, 1]
        per_token = h if h.dim() == 3 else h.reshape(h.shape[0], -1, h.shape[-1])
        weight = self.weight(mask, h, ctx)
        edited = self.operator.fused(per_token, strength, weight, rows, self.preserve_norm) if wanted(per_token) else None
        if edited is None:
            read = None if self.reading is None else self._read(per_token, ctx)
            edited = edited_without_kernel(self, per_token, strength, weight, rows, read)
        return edited if h.dim() == 3 else edited.reshape(h.shape)

    def _read(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """[batch, tokens, ...] the earlier activation that the edit depends on. h: [batch, tokens, width]."""
        read = ctx.scratch.readings.get(self.reading or "")
        if read is None:
            raise _unread(self.name, str(self.operator.reads_at))
        return read.to(h.device).reshape(*h.shape[:-1], -1)


def edited_without_kernel(
    active: ActiveIntervention, h: Tensor, strength: Tensor, weight: Tensor | None, rows: Tensor | None, read: Tensor | None = None
) -> Tensor:
    """The edited activation without a kernel. h: [batch, tokens, width]; read: see `Operator.reads_at`."""
    operator = active.operator
    per_row = tensors_of_rows(operator.tensors, rows)
    if read is not None:
        per_row = {**per_row, "read": read}
    if not active.preserve_norm:
        return operator.apply(h, strength, weight, per_row)
    # in fp32 at least, and only then in the dtype of h: hidden norms, and edits on the way to their scale, go beyond what fp16 holds
    wide = widened(h)
    edited = operator.apply(wide, strength, None if weight is None else weight.to(wide.dtype), per_row)
    unedited = (strength if weight is None else strength * weight) == 0  # [batch, tokens, 1]
    # the quotient of the norms is 1 there, but its gradient is 0 only up to rounding
    return torch.where(unedited, h, with_norm_of(wide, edited).to(h.dtype))


def _faded(mask: Mask, fade: Tensor | None) -> Tensor:
    """[batch, tokens, 1]: mask x fade, one of which is a tensor."""
    if fade is None:
        assert isinstance(mask, Tensor)
        return mask.unsqueeze(-1)
    return (fade * mask).unsqueeze(-1)


# ---- errors


def _prompt_in_other_phase(name: str, phases: tuple[str, ...], prompt_phase: str) -> ContextError:
    return ContextError(
        f"'{name}' acts in {', '.join(phases)}, and the prompt of this generation ran in the phase {prompt_phase}",
        expected="a generation, from its prompt on",
        found="a cache that the model made of its own accord, in a call that did not ask for one",
        remedy="pass use_cache=True, or a cache, in the call that runs the prompt",
    )


def _no_activation_per_token(site: str, tokens: torch.Size, h: Tensor) -> ContextError:
    return ContextError(
        f"'{site}' does not hold one activation per token",
        expected=f"{list(tokens)} tokens, as in the forward pass",
        found=list(h.shape[:-1]),
        remedy="choose a site of the residual stream, attention or MLP",
    )


def _unread(name: str, site: str) -> ContextError:
    return ContextError(
        f"'{name}' depends on '{site}', which has not run in this pass",
        expected=f"'{site}' to run first",
        found="no activation of it",
        remedy="let the pass go through the whole block",
    )


def _unknown_rows(name: str, slots: int) -> ContextError:
    return ContextError(
        f"'{name}' has {slots} row slots, but no row says which is its own",
        expected="a slot for each row of the batch",
        found="no call of attachment.set_rows so far",
        remedy="call attachment.set_rows([slot of row 0, slot of row 1, ...]) before the forward pass",
    )


def _unfitting_rows(name: str, batch: int, known: int) -> ContextError:
    return ContextError(
        f"row slots of '{name}' do not fit the batch",
        expected=f"{batch} rows",
        found=known,
        remedy="call attachment.set_rows for this batch",
    )
