"""Intervention: an operator at a site, on some tokens, in some phases, with a strength."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer import kernels
from steer.checks import of_type, tensor_of
from steer.errors import ConfigError, ContextError, NonFiniteError, WidthError
from steer.intervene import gate as gates
from steer.intervene import schedule as schedules
from steer.intervene.kept import Kept
from steer.intervene.operator import OPERATORS, Operator, Pick, check_finite
from steer.intervene.scope import Scope, Window, both
from steer.model.context import PHASES, ROLES, ForwardContext, Mask
from steer.model.site import Site


class Intervention(Kept):
    """One edit of one activation tensor.

    Args:
        operator: what is done, e.g. `Add(vector)`.
        site: where, e.g. `layers.12.output`.
        scope: on which tokens, see `steer.intervene.scope`.
        strength: factor of the edit; a list gives one per row slot.
        phases: subset of train, validate, generate.
        roles: subset of policy, reference; the reference pass of DPO and GRPO is left alone unless it is named here.
        schedule: factor over optimiser steps, advanced by `Plan.step`.
        name: unique in a plan; made from operator and site when empty.
        gate: decides from the model's activations whether, or how far, it acts; see `steer.intervene.gate`.
        preserve_norm: the edited activation gets the norm that it had before, whatever the operator did.

    Attributes:
        base: [1 or slots] the strength as it was set; `effective`, what the hook reads, is base x schedule x switch.
        slots: number of row slots; 1 when every row is treated alike. `rows` says which slot each row of a batch uses.
        key: names its set of tokens; interventions of a plan with the same key act on the same ones.
        decisions: names of what the leaves of its gate decide, given by the plan that it is attached with.

    Raises:
        ConfigError, SiteError, NonFiniteError.
    """

    def __init__(
        self,
        operator: Operator,
        site: Site | str,
        scope: Scope | str = "all",
        strength: float | Sequence[float] | Tensor = 1.0,
        phases: Sequence[str] = PHASES,
        roles: Sequence[str] = ("policy",),
        schedule: Any = None,
        name: str = "",
        enabled: bool = True,
        gate: gates.Gate | None = None,
        preserve_norm: bool = False,
    ) -> None:
        of_type(operator, Operator, "the operator of an intervention", "pass an operator such as Add(vector)")
        # a scope of its own, so that no other plan moves its window
        of_type(scope, (str, Scope), "the scope of an intervention", "write it as text, e.g. 'response'")
        of_type(name, str, "the name of an intervention", "pass text, or leave it out")
        for flag, given in (("enabled", enabled), ("preserve_norm", preserve_norm)):
            of_type(given, bool, f"`{flag}` of an intervention", "pass True or False")
        if gate is not None:
            of_type(gate, gates.Gate, "the gate of an intervention", "pass a gate such as ProbeGate(vector), or leave it out")
        self.operator, self.site, self.scope, self.enabled = operator, Site.parse(site), Scope.parse(str(scope)), enabled
        operator.check_site(self.site)
        self.roles = _subset(roles, ROLES, "role")
        self.schedule = schedules.from_dict(schedule)
        self.name = name or f"{operator.name}@{self.site}"
        self.base = self._strengths(strength)
        with torch.inference_mode(False):  # it is written to when training follows
            self.effective = self.base.clone()
        self.slots = max(operator.slots, self.base.numel())
        self.rows: Tensor | None = None
        self.gate, self.preserve_norm = gate, preserve_norm
        self.tokens_named, self._plan = str(self.scope), 0
        self.decisions: list[str] = []
        self.set_phases(_subset(phases, PHASES, "phase"))

    def copy(self, memo: dict[int, Any]) -> Intervention:
        """One like it with tensors, strengths, switch, scope and row slots of its own; what is being learned stays the same parameters.

        Args:
            memo: as of `copy.deepcopy`, one for all that are copied together: a gate or a tensor that they share stays one.
        """
        memo |= {id(parameter): parameter for parameter in self.parameters.values()}
        with torch.inference_mode(False):  # training may follow
            made = copy.copy(self)
            made.operator, made.gate = self.operator.copy(memo), copy.deepcopy(self.gate, memo)
            made.rows = None if self.rows is None else self.rows.clone()
            made.scope = Scope.parse(str(self.scope))
            made.base, made.effective = self.base.clone(), self.effective.clone()
        return made

    def set_phases(self, phases: Sequence[str]) -> None:
        """Changes when it acts, which the hooks of a plan take up at its next attach; no phase at all means never."""
        self.phases = tuple(phases)
        self.key = f"plan {self._plan}: {self.tokens_named} in {self.phases} for {self.roles}"

    def set_plan(self, number: int) -> None:
        """Says which of the plans stacked on a model it belongs to."""
        self._plan = number
        self.set_phases(self.phases)

    def check_window(self, start: int | None, stop: int | None) -> None:
        """Raises ConfigError unless the scope has one slice, and it may have these bounds."""
        if wrong := [end for end in (start, stop) if end is not None and (type(end) is not int or abs(end) >= 10**9)]:
            raise ConfigError(
                f"the window of '{self.name}' has no such bound",
                expected="whole numbers of tokens, or None for an open end",
                found=repr(wrong[0]),
                remedy="e.g. plan.set_window(0, 32)",
            )
        Window.check(start, stop)
        slices = self.scope.slices
        if len(slices) != 1:
            raise ConfigError(
                f"'{self.name}' has no window to move",
                expected="a scope with one slice, e.g. generated[:32]",
                found=str(self.scope),
                remedy="make the intervention with such a scope",
            )
        if min(start or 0, stop or 0) < 0 and any(one.kind == "generated" and one.window is slices[0] for one in self.scope.selectors):
            raise ConfigError(
                f"the window of '{self.name}' counts from an end that is not known while decoding",
                expected="bounds from 0 on",
                found=f"{start}:{stop}",
                remedy="count from the first generated token",
            )

    def share(self, scope: Scope) -> None:
        """Uses the scope of another intervention of its plan that names the same tokens: one window moves for both."""
        self.scope, self.tokens_named = scope, str(scope)
        self.set_phases(self.phases)

    def own_scope(self) -> None:
        """Takes leave of the scope that it shares with other interventions of its plan."""
        self.scope, self.tokens_named = Scope.parse(str(self.scope)), f"{self.scope} of {self.name}"
        self.scope.to(self.effective.device)
        self.set_phases(self.phases)

    def _strengths(self, strength: float | Sequence[float] | Tensor) -> Tensor:
        given = tensor_of(strength, f"strength of '{self.name}'", "pass a number, or one per row slot")
        base = given.detach().to(torch.float32, copy=True).reshape(-1)
        check_finite(base, f"strength of '{self.name}'")
        slots = self.operator.slots
        if base.numel() == 0 or base.numel() not in (1, slots) and slots > 1:
            expected = f"1 or {slots}" if slots > 1 else "at least 1"
            remedy = "give one number for all rows, or one for each row slot"
            raise ConfigError(f"wrong number of strengths for '{self.name}'", expected=expected, found=base.numel(), remedy=remedy)
        return base

    def refresh(self, step: int) -> None:
        """Writes strength x schedule x switch into the buffer that the hook reads; in place, so compiled code sees it."""
        factor = self.schedule(step) if self.enabled else 0.0
        if not math.isfinite(factor):
            raise NonFiniteError(
                f"the schedule of '{self.name}' is not finite",
                expected="a finite factor at every step",
                found=f"{factor} at step {step}",
                remedy="correct the numbers of the schedule",
            )
        self.effective.copy_(self.base * factor)

    def check_range(self, dtype: torch.dtype) -> None:
        """Raises NonFiniteError when what it adds is beyond what activations of this type hold."""
        if not self.operator.additive or not dtype.is_floating_point:
            return
        largest = float(self.base.abs().max() * self.operator.tensors["vector"].detach().abs().max())
        if largest > torch.finfo(dtype).max:
            raise NonFiniteError(
                f"'{self.name}' adds more than {dtype} holds",
                expected=f"at most {torch.finfo(dtype).max:g} for each channel",
                found=f"{largest:g}",
                remedy="lower the strength or the vector, or run the model in bfloat16 or float32",
            )

    def move(self, device: torch.device) -> None:
        """Puts every tensor on a device; outside inference mode, since training may follow a validation run."""
        with torch.inference_mode(False):
            self.operator.to(device)
            self.effective = self.effective.to(device)
            self.rows = None if self.rows is None else self.rows.to(device)

    def tokens(self, ctx: ForwardContext) -> Mask:
        """The tokens meant in this pass, [batch, tokens] bool or a constant; the same for all interventions with this `key`."""
        found = ctx.masks.get(self.key)
        if found is None:
            acts = ctx.phase in self.phases and ctx.role in self.roles
            if acts and ctx.outside is not None and ctx.outside not in self.phases:
                raise ContextError(
                    f"'{self.name}' acts in {', '.join(self.phases)}, and the prompt of this generation ran in the phase {ctx.outside}",
                    expected="a generation, from its prompt on",
                    found="a cache that the model made of its own accord, in a call that did not ask for one",
                    remedy="pass use_cache=True, or a cache, in the call that runs the prompt",
                )
            found = ctx.masks[self.key] = self.scope.mask(ctx) if acts else False
        return found

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """Edited activation, or `h` itself when no token of this pass is meant. h: [batch, tokens, width]."""
        known = ctx.sums.get(self)
        if known is not None and known.shape == h.shape and known.dtype is h.dtype and known.device == h.device:
            return h + known
        mask = self.tokens(ctx)
        if mask is False:
            return h
        if self.effective.device != h.device:
            self.move(h.device)
        if h.shape[-1] != self.operator.width:
            raise width_error(self, h.shape[-1])
        rows = self.rows_of(ctx, h.shape[0]) if self.slots > 1 else None
        strength = self.effective if rows is None or self.effective.shape[0] == 1 else self.effective[rows]
        strength = strength.view(-1, 1, 1)
        whole = h if h.dim() == 3 else h.reshape(h.shape[0], -1, h.shape[-1])
        weight, pick = self._weight(mask, h, ctx), Pick(self.operator, rows)
        new = self.operator.fused(whole, strength, weight, pick, self.preserve_norm) if kernels.wanted(whole) else None
        if new is None:
            edit = self._with_norm if self.preserve_norm else self.operator.apply
            new = edit(whole, strength, weight, pick)
        return new if h.dim() == 3 else new.reshape(h.shape)

    def _with_norm(self, h: Tensor, strength: Tensor, weight: Tensor | None, pick: Pick) -> Tensor:
        """The edit in fp32 at least, scaled back to the norm before it, and only then in the dtype of h: hidden norms, and edits on the way
        to their scale, go beyond what fp16 holds. Where nothing is edited every bit stays."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        weight = None if weight is None else weight.to(wide.dtype)
        new = self.operator.apply(wide, strength, weight, pick)
        before, after = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (wide, new))
        new = new * (before / torch.where(after > 0, after, 1.0))
        still = (strength if weight is None else strength * weight) == 0
        return torch.where(still, h, new.to(h.dtype))

    def prepare(self, ctx: ForwardContext, dtype: torch.dtype) -> None:
        """Works the tokens out when a pass opens: static caches count on while it runs, and sites need them ready."""
        if self.key in ctx.columns:
            return
        mask, fade = self.tokens(ctx), self._fade(ctx)
        if fade is not None or isinstance(mask, Tensor):
            ctx.columns[self.key] = _faded(mask, fade).to(dtype)

    def _fade(self, ctx: ForwardContext) -> Tensor | None:
        return None if ctx.masks.get(self.key) is False else self.scope.fade(ctx)

    def _weight(self, mask: Mask, h: Tensor, ctx: ForwardContext) -> Tensor | None:
        """[batch, tokens or 1, 1] from 0 to 1 in the dtype of h: scope, decay and gate; None for 1 everywhere."""
        weight = self._column(mask, h, ctx)
        if self.gate is None:
            return weight
        opened = self.gate.opened(ctx, iter(self.decisions)).to(h.device, h.dtype)
        if opened.shape[1] not in (1, h.shape[1]):  # the unembedding may get the last tokens only
            opened = ctx.kept_of(opened, h.shape[1])
        return opened if weight is None else weight * opened

    def _column(self, mask: Mask, h: Tensor, ctx: ForwardContext) -> Tensor | None:
        """The mask on the tokens that this site sees, faded by the decay, [batch, tokens, 1] in the dtype of h; None for 1 everywhere."""
        column = ctx.columns.get(self.key)
        if column is not None and column.dtype is h.dtype and column.shape[:-1] == h.shape[:-1]:
            return column.to(h.device)  # a model may lie on several
        fade = self._fade(ctx)
        if fade is None and mask is True:
            return None
        mask = _faded(mask, fade).squeeze(-1)
        if mask.shape != h.shape[:-1] and self.site.part == "logits" and h.dim() == 3:
            mask = ctx.kept_of(mask, h.shape[1])  # the unembedding may get the last tokens only
        if mask.shape != h.shape[:-1]:
            raise ContextError(
                f"'{self.site}' does not hold one activation per token",
                expected=f"{list(mask.shape)} tokens, as in the forward pass",
                found=list(h.shape[:-1]),
                remedy="choose a site of the residual stream, attention or MLP",
            )
        return mask.unsqueeze(-1).to(h.device, h.dtype)

    def acting(self, ctx: ForwardContext) -> Mask:
        """The tokens on which it acts in this pass, [batch, tokens] bool or a constant: those of the scope, whose row has a strength
        other than 0 and whose gate is more open than not. Read when the pass is over."""
        mask = self.tokens(ctx)
        if mask is False or not ctx.tokens:
            return mask
        if self.slots > 1:
            live = (self.effective != 0).expand(self.slots)[self.rows_of(ctx, ctx.batch)].to(ctx.device)
            mask = both(mask, live[:, None].expand(-1, ctx.tokens))
        if self.gate is not None:
            with torch.no_grad():
                opened = (self.gate.opened(ctx, iter(self.decisions)) > 0.5).squeeze(-1).to(ctx.device)
            if opened.shape[1] not in (1, ctx.tokens) and isinstance(mask, Tensor):  # the unembedding may get the last tokens only
                mask = ctx.kept_of(mask, opened.shape[1])
            mask = both(mask, opened.expand(ctx.batch, ctx.tokens if opened.shape[1] == 1 else -1))
        return mask

    @property
    def adds_alike(self) -> bool:
        """What it adds to a token depends on nothing but the token's share in its scope."""
        return self.operator.additive and self.slots == 1 and self.gate is None and not self.preserve_norm

    @property
    def counts_calls(self) -> bool:
        """Whether it acts is not known by the end of the decoder's pass."""
        return self.site.module is not None or self.gate is not None and self.site.part == "logits"

    def rows_of(self, ctx: ForwardContext, batch: int) -> Tensor:
        """Slot of each row of this pass, [batch]; beams and returned sequences follow their prompt's row."""
        if self.rows is None:
            raise ContextError(
                f"'{self.name}' has {self.slots} row slots, but no row says which is its own",
                expected="a slot for each row of the batch",
                found="no call of plan.set_rows so far",
                remedy="call plan.set_rows([slot of row 0, slot of row 1, ...]) before the forward pass",
            )
        given = self.rows.shape[0]
        if given == batch:
            return self.rows
        if ctx.phase == "generate" and given and batch % given == 0:
            return self.rows.repeat_interleave(batch // given)
        raise ContextError(
            f"row slots of '{self.name}' do not fit the batch",
            expected=f"{batch} rows",
            found=given,
            remedy="call plan.set_rows for this batch",
        )

    @classmethod
    def from_dict(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
        """Inverse of `to_dict` and `files`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.rpartition(".")
            parts.setdefault(part, {})[name] = tensor
        operator = OPERATORS.get(spec["operator"]).restore(parts.pop("", {}), spec["options"])
        gate = None
        if spec["gate"] is not None:
            ordered = sorted(parts, key=lambda part: int(part.removeprefix("gate")))
            gate = gates.from_dict(spec["gate"], iter([parts[part] for part in ordered]))
        rest = {key: spec[key] for key in ("name", "site", "scope", "strength", "phases", "roles", "schedule", "enabled", "preserve_norm")}
        one = cls(operator, gate=gate, **rest)
        learned = {name.rpartition(".")[0] for name in spec["learned"]}
        for prefix, holder in one.driven.items():
            if prefix.removesuffix(".") in learned:
                holder.train()
        for name in spec.get("frozen", ()):  # older files do not say
            one.parameters[name].requires_grad_(False)
        return one


def _faded(mask: Mask, fade: Tensor | None) -> Tensor:
    """[batch, tokens, 1]: mask x fade, one of which is a tensor."""
    if fade is None:
        assert isinstance(mask, Tensor)
        return mask.unsqueeze(-1)
    return (fade * mask).unsqueeze(-1)


def width_error(intervention: Intervention, found: int) -> WidthError:
    return WidthError(
        f"the vector of '{intervention.name}' does not fit site '{intervention.site}'",
        expected=f"width {found}",
        found=f"width {intervention.operator.width}",
        remedy="extract the vector on this model and at this site",
    )


def _subset(chosen: Sequence[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    of_type(chosen, (str, list, tuple, set), f"the {what}s of an intervention", f"pass names such as ('{known[0]}',)")
    chosen = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if not chosen or not set(chosen) <= set(known):
        remedy = f"name the {what}s in which it acts, e.g. {what}s=('{known[0]}',)"
        raise ConfigError(f"unknown or missing {what}", expected=f"some of {', '.join(known)}", found=chosen or "none", remedy=remedy)
    return chosen
