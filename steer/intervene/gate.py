"""Gates: whether an intervention acts, decided by the model's own activations.

This is conditional steering (CAST: Lee et al. 2024, arXiv 2409.05907). A gate reads one site and gives every token or every row a number
from 0 to 1, with which the edit is multiplied. Gates combine with `&`, `|` and `~`. A new kind is a file with one registered subclass of
`Leaf`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.errors import ConfigError, ContextError
from steer.intervene.operator import Driven
from steer.intervene.scope import Scope
from steer.model.context import ForwardContext, Mask
from steer.model.site import Site, did_you_mean
from steer.registry import Registry

GATES: Registry[type[Leaf]] = Registry("gate")
PER = ("token", "row", "generation")
POOLS = ("mean", "max")
_NUMBERS = itertools.count()  # tells the gates of a process apart


class Gate:
    """A leaf, or a combination of gates."""

    def __and__(self, other: Gate) -> Gate:
        return And(self, other)

    def __or__(self, other: Gate) -> Gate:
        return Or(self, other)

    def __invert__(self) -> Gate:
        return Not(self)

    def leaves(self) -> Iterator[Leaf]:
        """Its leaves, from left to right."""
        raise NotImplementedError

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        """[batch, tokens or 1, 1] fp32 from 0 to 1, out of what the leaves decided in this pass, under these names from left to right."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the tensors."""
        raise NotImplementedError


class Combined(Gate):
    """A gate made of gates."""

    word: ClassVar[str]

    def __init__(self, *parts: Gate) -> None:
        self.parts = parts

    def leaves(self) -> Iterator[Leaf]:
        for part in self.parts:
            yield from part.leaves()

    def to_dict(self) -> dict[str, Any]:
        return {self.word: [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return f"({f' {self.word} '.join(map(str, self.parts))})"


class And(Combined):
    word = "and"

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        a, b = self.parts
        return a.value(ctx, decisions) * b.value(ctx, decisions)


class Or(Combined):
    word = "or"

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        a, b = [part.value(ctx, decisions) for part in self.parts]
        return a + b - a * b


class Not(Combined):
    word = "not"

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        return 1 - self.parts[0].value(ctx, decisions)

    def __str__(self) -> str:
        return f"not {self.parts[0]}"


class Leaf(Gate, Driven):
    """A gate that reads one site.

    Args:
        tensors: what it compares with, first dimension 1.
        width: of the activation it reads.
        site: where it reads, at or before the intervention's own site; None for that site. It sees the activation as it arrives there,
            before the plan edits it.
        per: `token` decides for each token; `row` once for each row (or packed segment) of each pass; `generation` likewise, but what was
            decided on the prompt holds for all tokens decoded from its cache.
        over: for `row` and `generation`: the tokens that are looked at.
        pool: how their margins become one, `mean` or `max`. A row without such tokens stays closed.
        sharpness: None compares; a number k makes sigmoid(k * margin), which lets gradients through.

    Raises:
        ConfigError, SiteError, NonFiniteError.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        width: int,
        *,
        site: Site | str | None = None,
        per: str = "token",
        over: Scope | str = "prompt",
        pool: str = "mean",
        sharpness: float | None = None,
    ) -> None:
        Driven.__init__(self, tensors, width)
        self.site = None if site is None else Site.parse(site)
        self.per, self.over, self.pool, self.sharpness = (
            _one_of(per, PER, "per"),
            Scope.parse(over),
            _one_of(pool, POOLS, "pool"),
            sharpness,
        )
        if sharpness is not None and not sharpness > 0:
            raise ConfigError(
                f"sharpness of gate '{self.name}'",
                expected="a positive number, or None for a comparison",
                found=sharpness,
                remedy="e.g. 10.0",
            )
        self.number = next(_NUMBERS)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """How far each token is beyond the threshold, [batch, tokens] fp32; open above 0. h: [batch, tokens, width]."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        yield self

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.over.to(device)

    def read(self, h: Tensor, ctx: ForwardContext, decision: str) -> None:
        """Decides, and leaves the decision in the pass under its name: [batch, tokens or 1, 1]."""
        if next(iter(self.tensors.values()), h).device != h.device:
            self.to(h.device)
        if self.per == "generation" and ctx.phase == "generate":
            # with the number, since a cache may outlive the plan: what another gate decided must not be taken for this one's
            opened = ctx.remember(f"{decision} number {self.number}", lambda: self._of_rows(h, ctx)[:, -1:])
        else:
            opened = self._switch(self.margin(h, ctx)) if self.per == "token" else self._of_rows(h, ctx)
        ctx.opened[decision] = opened.unsqueeze(-1)

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        found = ctx.opened.get(next(decisions))
        if found is None:
            raise ContextError(
                f"gate '{self.name}' did not decide before the activation that it is for was reached",
                expected="its site to run first" if self.site is None else f"'{self.site}' to run first",
                found="it has not run in this pass",
                remedy="let the gate read a site that comes before the steered one",
            )
        return found

    def _switch(self, margin: Tensor) -> Tensor:
        return (margin > 0).float() if self.sharpness is None else torch.sigmoid(self.sharpness * margin)

    def _of_rows(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """[batch, 1], or [batch, tokens] where a row may hold several texts."""
        margin, looked = self.margin(h, ctx), self._looked_at(ctx)
        starts = None if ctx.phase == "generate" else ctx.starts
        if starts is None:
            count = looked.sum(1, keepdim=True)
            pooled = torch.where(looked, margin, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
            if self.pool == "max":
                pooled = margin.masked_fill(~looked, -torch.inf).amax(1, keepdim=True)
            return torch.where(count > 0, self._switch(pooled), 0.0)
        text = starts.long().cumsum(1)
        slots = torch.zeros(margin.shape[0], margin.shape[1] + 1, device=h.device)
        count = slots.scatter_add(1, text, looked.float())
        pooled = slots.scatter_add(1, text, torch.where(looked, margin, 0.0)) / count.clamp_min(1)
        if self.pool == "max":
            pooled = slots.scatter_reduce(1, text, margin.masked_fill(~looked, -torch.inf), "amax", include_self=False)
        return torch.where(count > 0, self._switch(pooled), 0.0).gather(1, text)

    def _looked_at(self, ctx: ForwardContext) -> Tensor:
        mask: Mask = self.over.mask(ctx)
        return mask if isinstance(mask, Tensor) else ctx.real & mask

    def options(self) -> dict[str, Any]:
        site = None if self.site is None else str(self.site)
        return {"site": site, "per": self.per, "over": str(self.over), "pool": self.pool, "sharpness": self.sharpness}

    def to_dict(self) -> dict[str, Any]:
        return {"gate": self.name, "options": self.options()}

    def __str__(self) -> str:
        where = "" if self.site is None else f" at {self.site}"
        return f"{self.name}{where} per {self.per}"


def from_dict(spec: dict[str, Any], tensors: Iterator[dict[str, Tensor]]) -> Gate:
    """Inverse of `Gate.to_dict`. tensors: those of each leaf, from left to right."""
    if "gate" in spec:
        return GATES.get(spec["gate"]).restore(next(tensors), spec["options"])
    combined = {kind.word: kind for kind in (And, Or, Not)}
    [(word, parts)] = spec.items()
    return combined[word](*(from_dict(part, tensors) for part in parts))


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        remedy = did_you_mean(str(value), known) or "choose one of these"
        raise ConfigError(f"unknown '{what}' of a gate", expected=f"one of {', '.join(known)}", found=value, remedy=remedy)
    return value
