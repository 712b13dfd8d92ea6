"""Intervention: an operator at a site, on some tokens, in some phases, with a strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError, ContextError, WidthError
from steer.intervene import schedule as schedules
from steer.intervene.operator import OPERATORS, Operator, Pick, check_finite
from steer.intervene.scope import Scope
from steer.model.context import PHASES, ROLES, ForwardContext, Mask
from steer.model.site import Site


class Intervention:
    """One edit of one activation tensor.

    Args:
        operator: what is done, e.g. `Add(vector)`.
        site: where, e.g. `layers.12.output`.
        scope: on which tokens, see `steer.intervene.scope.KINDS`.
        strength: factor of the edit; a list gives one per row slot.
        phases: subset of train, validate, generate.
        roles: subset of policy, reference; the reference pass of DPO and GRPO is left alone unless it is named here.
        schedule: factor over optimiser steps, advanced by `Plan.step`.
        name: unique in a plan; made from operator and site when empty.

    Attributes:
        base: [1 or slots] the strength as it was set; `effective`, what the hook reads, is base x schedule x switch.
        slots: number of row slots; 1 when every row is treated alike. `rows` says which slot each row of a batch uses.
        key: names its set of tokens; interventions with the same key act on the same ones.

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
    ) -> None:
        self.operator, self.site, self.scope, self.enabled = operator, Site.parse(site), Scope.parse(scope), enabled
        self.roles = _subset(roles, ROLES, "role")
        self.schedule = schedules.from_dict(schedule)
        self.name = name or f"{operator.name}@{self.site}"
        self.base = self._strengths(strength)
        self.effective = self.base.clone()
        self.slots = max(operator.slots, self.base.numel())
        self.rows: Tensor | None = None
        self.set_phases(_subset(phases, PHASES, "phase"))

    def set_phases(self, phases: Sequence[str]) -> None:
        """Changes when it acts, which the hooks of a plan take up at its next attach; no phase at all means never."""
        self.phases = tuple(phases)
        self.key = f"{self.scope} in {self.phases} for {self.roles}"

    def _strengths(self, strength: float | Sequence[float] | Tensor) -> Tensor:
        base = torch.as_tensor(strength, dtype=torch.float32).detach().clone().reshape(-1)
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
        self.effective.copy_(self.base * factor)

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
            found = ctx.masks[self.key] = self.scope.mask(ctx) if acts else False
        return found

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """Edited activation, or `h` itself when no token of this pass is meant. h: [batch, tokens, width]."""
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
        weight = None if mask is True else self._column(mask, h, ctx)
        if h.dim() == 3:
            return self.operator.apply(h, strength, weight, Pick(self.operator, rows))
        return self.operator.apply(h.reshape(h.shape[0], -1, h.shape[-1]), strength, weight, Pick(self.operator, rows)).reshape(h.shape)

    def prepare(self, ctx: ForwardContext, dtype: torch.dtype) -> None:
        """Works the tokens out when a pass opens: static caches count on while it runs, and sites need them ready."""
        if isinstance(mask := self.tokens(ctx), Tensor):
            ctx.columns[self.key] = mask.unsqueeze(-1).to(dtype)

    def _column(self, mask: Tensor, h: Tensor, ctx: ForwardContext) -> Tensor:
        """The mask on the tokens that this site sees, [batch, tokens, 1] of 0 and 1 in the dtype of h."""
        column = ctx.columns.get(self.key)
        if column is not None and column.dtype is h.dtype and column.shape[:-1] == h.shape[:-1]:
            return column
        if mask.shape != h.shape[:-1] and self.site.part == "logits" and h.dim() == 3:
            # the unembedding may get the last tokens only
            mask = mask[:, ctx.kept] if isinstance(ctx.kept, Tensor) else mask[:, -h.shape[1] :]
        if mask.shape != h.shape[:-1]:
            raise ContextError(
                f"'{self.site}' does not hold one activation per token",
                expected=f"{list(mask.shape)} tokens, as in the forward pass",
                found=list(h.shape[:-1]),
                remedy="choose a site of the residual stream, attention or MLP",
            )
        return mask.unsqueeze(-1).to(h.dtype)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the tensors."""
        return {
            "name": self.name,
            "operator": self.operator.name,
            "options": self.operator.options(),
            "site": str(self.site),
            "scope": str(self.scope),
            "strength": self.base.tolist(),
            "phases": list(self.phases),
            "roles": list(self.roles),
            "schedule": schedules.to_dict(self.schedule),
            "enabled": self.enabled,
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
        operator = OPERATORS.get(spec["operator"]).restore(tensors, spec["options"])
        rest = {key: spec[key] for key in ("name", "site", "scope", "strength", "phases", "roles", "schedule", "enabled")}
        return cls(operator, **rest)


def width_error(intervention: Intervention, found: int) -> WidthError:
    return WidthError(
        f"the vector of '{intervention.name}' does not fit site '{intervention.site}'",
        expected=f"width {found}",
        found=f"width {intervention.operator.width}",
        remedy="extract the vector on this model and at this site",
    )


def _subset(chosen: Sequence[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    chosen = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if not chosen or not set(chosen) <= set(known):
        remedy = f"name the {what}s in which it acts, e.g. {what}s=('{known[0]}',)"
        raise ConfigError(f"unknown or missing {what}", expected=f"some of {', '.join(known)}", found=chosen or "none", remedy=remedy)
    return chosen
