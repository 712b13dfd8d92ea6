"""Gates: whether an intervention acts, decided by the model's own activations.

This is conditional steering (CAST: Lee et al. 2024, arXiv 2409.05907). A gate reads one site and gives every token or every row a number
from 0 to 1, with which the edit is multiplied. Gates combine with `&`, `|` and `~`. A new kind is a file with one registered subclass of
`Leaf`.

What a gate says of a token is a pair: how far it is open, and how far closed. Both are 0 where there was nothing to decide by, so that the
negation of a gate that had no prompt to look at does not open.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steer.checks import of_type, tensor_of
from steer.errors import ConfigError, ContextError, did_you_mean
from steer.intervene.operator import Driven
from steer.intervene.scope import Scope
from steer.model.context import ForwardContext, Mask
from steer.model.site import Site
from steer.registry import Registry

GATES: Registry[type[Leaf]] = Registry("gate", "steer.intervene.gates", "steer.gates")
PER = ("token", "row", "generation")
POOLS = ("mean", "max")
_NUMBERS = itertools.count()  # tells the gates of a process apart


class Gate:
    """A leaf, or a combination of gates."""

    def __and__(self, other: Gate) -> Gate:
        return And(self, _gate(other))

    def __or__(self, other: Gate) -> Gate:
        return Or(self, _gate(other))

    def __invert__(self) -> Gate:
        return Not(self)

    def leaves(self) -> Iterator[Leaf]:
        """Its leaves, from left to right."""
        raise NotImplementedError

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        """[batch, tokens or 1, 2] from 0 to 1, how far open and how far closed.

        Args:
            decisions: names under which the leaves left their decisions in this pass, from left to right.
        """
        raise NotImplementedError

    def opened(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        """[batch, tokens or 1, 1]: how far open."""
        return self.value(ctx, decisions)[..., :1]

    def __bool__(self) -> bool:
        raise ConfigError(
            "gates do not combine by and, or, not",
            expected="& for and, | for or, ~ for not",
            found="Python's own words, which would drop one of the gates",
            remedy="e.g. (first & ~second)",
        )

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
        a, b = [part.value(ctx, decisions) for part in self.parts]
        return _both(a, b)


class Or(Combined):
    word = "or"

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        a, b = [part.value(ctx, decisions) for part in self.parts]
        return _both(a.flip(-1), b.flip(-1)).flip(-1)


class Not(Combined):
    word = "not"

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        return self.parts[0].value(ctx, decisions).flip(-1)

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
            decided on the prompt holds for all tokens decoded from its cache. A prompt that continues a copied cache is decided by its own
            pass.
        over: for `row` and `generation`: the tokens that are looked at.
        pool: how their margins become one, `mean` or `max`. Without such tokens there is no decision and nothing is steered: `row` over the
            prompt therefore leaves decoded tokens alone, which come in passes of their own.
        sharpness: None compares; a number k makes sigmoid(k * margin), which lets gradients through. Compiled code sees it change when it
            is written to in `tensors`, as it sees thresholds.

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
        sharpness: float | Tensor | None = None,
    ) -> None:
        if sharpness is not None:
            tensors = {**tensors, "sharpness": one_number(sharpness, f"sharpness of gate '{self.name}'")}
            if not tensors["sharpness"] > 0:
                raise ConfigError(
                    f"sharpness of gate '{self.name}'",
                    expected="a positive number, or None for a comparison",
                    found=sharpness,
                    remedy="e.g. 10.0",
                )
        Driven.__init__(self, tensors, width)
        for name, tensor in tensors.items():
            if tensor.shape[0] != 1:
                raise ConfigError(
                    f"gate '{self.name}' has several entries of '{name}'",
                    expected="one for all rows",
                    found=list(tensor.shape),
                    remedy="combine one gate for each of them with | or &",
                )
        self.site = None if site is None else Site.parse(site)
        self.per, self.over, self.pool = _one_of(per, PER, "per"), Scope.parse(str(over)), _one_of(pool, POOLS, "pool")
        if self.over.half_life is not None:
            raise ConfigError(
                f"gate '{self.name}' cannot look at tokens that fade",
                expected="a scope without '~'",
                found=str(self.over),
                remedy="put the half-life into the scope of the intervention",
            )
        self.number = next(_NUMBERS)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """How far each token is beyond the threshold, [batch, tokens] fp32 or fp64; open above 0. h: [batch, tokens, width]."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        yield self

    @property
    def is_soft(self) -> bool:
        return "sharpness" in self.tensors

    def train(self) -> Self:
        """Makes the learnable tensors parameters. Raises ConfigError for a comparison, which has no gradient."""
        if not self.is_soft:
            raise ConfigError(
                f"gate '{self.name}' compares, which cannot be learned",
                expected="a soft gate",
                found="sharpness=None",
                remedy="make it with sharpness=..., e.g. 10.0",
            )
        return super().train()

    def read(self, h: Tensor, ctx: ForwardContext, decision: str) -> None:
        """Decides, and leaves the decision in the pass under its name: [batch, tokens or 1, 2]."""
        if next(iter(self.tensors.values()), h).device != h.device:
            self.to(h.device)
        if self.per == "generation" and ctx.phase == "generate":
            # with the number, since a cache may outlive the plan: what another gate decided must not be taken for this one's
            opened = ctx.remember(f"{decision} number {self.number}", lambda: self._of_rows(h, ctx)[:, -1:])
        else:
            opened = self._switch(self.margin(h, ctx)) if self.per == "token" else self._of_rows(h, ctx)
        ctx.opened[decision] = opened
        if self.is_soft and ctx.phase == "train":
            (ctx.blind.discard if torch.is_grad_enabled() else ctx.blind.add)(decision)

    def value(self, ctx: ForwardContext, decisions: Iterator[str]) -> Tensor:
        decision = next(decisions)
        found = ctx.opened.get(decision)
        if decision in ctx.blind and torch.is_grad_enabled():
            raise ContextError(
                f"soft gate '{self.name}' decided where no gradients are recorded",
                expected="a decision that gradients go through",
                found="a site inside a block under reentrant gradient checkpointing, and a steered site outside of it",
                remedy="use gradient_checkpointing_enable({'use_reentrant': False}), or read the output of a block",
            )
        if found is None:
            raise ContextError(
                f"gate '{self.name}' did not decide before the activation that it is for was reached",
                expected="its site to run first" if self.site is None else f"'{self.site}' to run first",
                found="it has not run in this pass",
                remedy="let the gate read a site that comes before the steered one",
            )
        return found

    def _switch(self, margin: Tensor) -> Tensor:
        opened = torch.sigmoid(self.tensors["sharpness"] * margin) if self.is_soft else (margin > 0).to(margin.dtype)
        return torch.stack((opened, 1 - opened), -1)

    def _of_rows(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """[batch, 1, 2], or [batch, tokens, 2] where a row may hold several texts."""
        margin, looked = self.margin(h, ctx), self._looked_at(ctx)
        if looked.shape != margin.shape:
            looked = ctx.kept_of(looked, margin.shape[1])
        looked = looked.to(margin.device)  # a model may lie on several
        starts = None if ctx.phase == "generate" else ctx.starts
        if starts is None:
            count = looked.sum(1, keepdim=True)
            pooled = torch.where(looked, margin, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
            if self.pool == "max":
                pooled = margin.masked_fill(~looked, -torch.inf).amax(1, keepdim=True)
            return torch.where(count.unsqueeze(-1) > 0, self._switch(pooled), 0.0)
        text = starts.to(margin.device).long().cumsum(1)
        slots = margin.new_zeros(margin.shape[0], margin.shape[1] + 1)
        count = slots.scatter_add(1, text, looked.to(margin.dtype))
        pooled = slots.scatter_add(1, text, torch.where(looked, margin, 0.0)) / count.clamp_min(1)
        if self.pool == "max":
            pooled = slots.scatter_reduce(1, text, margin.masked_fill(~looked, -torch.inf), "amax", include_self=False)
        decided = torch.where(count.unsqueeze(-1) > 0, self._switch(pooled), 0.0)
        return decided.gather(1, text.unsqueeze(-1).expand(-1, -1, 2))

    def _looked_at(self, ctx: ForwardContext) -> Tensor:
        mask: Mask = self.over.mask(ctx)
        return mask if isinstance(mask, Tensor) else ctx.real & mask

    def options(self) -> dict[str, Any]:
        site = None if self.site is None else str(self.site)
        return {"site": site, "per": self.per, "over": str(self.over), "pool": self.pool}

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


def _gate(given: Any) -> Gate:
    of_type(given, Gate, "a part of a combined gate", "combine gates with gates, e.g. first & ~second")
    return given


def one_number(value: float | Tensor, what: str) -> Tensor:
    """[1] fp32. Raises ConfigError for anything but one number."""
    given = tensor_of(value, what, "pass a number")
    if given.numel() != 1:
        raise ConfigError(f"{what} is not one number", expected="one number for all rows", found=list(given.shape), remedy="pass a number")
    return given.detach().to(torch.float32, copy=True).reshape(1)


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Open as far as both are, closed as far as either is."""
    b = b.to(a.device)
    return torch.stack((a[..., 0] * b[..., 0], 1 - (1 - a[..., 1]) * (1 - b[..., 1])), -1)


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        remedy = did_you_mean(str(value), known) or "choose one of these"
        raise ConfigError(f"unknown '{what}' of a gate", expected=f"one of {', '.join(known)}", found=value, remedy=remedy)
    return value
