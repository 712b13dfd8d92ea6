"""Gates: whether an intervention acts, decided by the model's own activations.

This is conditional steering (CAST: Lee et al. 2024, arXiv 2409.05907). A gate reads one site and gives every token or every row a number
from 0 to 1, with which the edit is multiplied. Gates combine with `&`, `|` and `~`. A new kind is a file in `steer.intervene.gates` with
one registered subclass of `SiteGate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steer.checks import of_type, tensor_of
from steer.errors import ConfigError, ContextError, did_you_mean
from steer.intervene.decisions import as_pair, conjunction, decided_where, negation
from steer.intervene.file_form import file_form
from steer.intervene.operator import TensorHolder
from steer.intervene.scope import Scope
from steer.intervene.scope_mask import ScopeMask
from steer.model.context import Decision, ForwardContext, Mask
from steer.model.site import Site
from steer.registry import Registry

PER = ("token", "row", "generation")
POOLS = ("mean", "max")
_NUMBERS = itertools.count()  # tells the gates of a process apart


class Gate:
    """A gate that reads one site, or a combination of gates.

    Example:
        >>> from steer.intervene import CosineGate, ProbeGate
        >>> gate = ProbeGate(vector) & ~CosineGate(-vector, 0.3)
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", gate=gate))
    """

    def __and__(self, other: Gate) -> Gate:
        return And(self, _checked_gate(other))

    def __or__(self, other: Gate) -> Gate:
        return Or(self, _checked_gate(other))

    def __invert__(self) -> Gate:
        return Not(self)

    def site_gates(self) -> Iterator[SiteGate]:
        """The gates that it is made of, from left to right."""
        raise NotImplementedError

    def decision(self, ctx: ForwardContext, names: Iterator[str]) -> Decision:
        """How far it is open and closed in this pass.

        Args:
            names: under which its site gates left their decisions in this pass, from left to right.
        """
        raise NotImplementedError

    def opened(self, ctx: ForwardContext, names: tuple[str, ...]) -> Tensor:
        """[batch, tokens or 1, 1]: how far it is open in this pass."""
        return self.decision(ctx, iter(names)).opened

    def copied(self, tensors: dict[int, Tensor], gates: dict[int, Gate]) -> Gate:
        """The same gate with tensors of its own. tensors: see `TensorHolder.copy`; gates: copies by id of the site gate."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        raise _python_words()

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the tensors."""
        raise NotImplementedError


class CombinedGate(Gate):
    """A gate made of gates."""

    word: ClassVar[str]

    def __init__(self, *parts: Gate) -> None:
        self.parts = parts

    def site_gates(self) -> Iterator[SiteGate]:
        for part in self.parts:
            yield from part.site_gates()

    def copied(self, tensors: dict[int, Tensor], gates: dict[int, Gate]) -> Gate:
        return type(self)(*(part.copied(tensors, gates) for part in self.parts))

    def to_dict(self) -> dict[str, Any]:
        if COMBINATIONS.get(self.word) is not type(self):
            raise _unknown_combination(self)
        return {self.word: [part.to_dict() for part in self.parts]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    def __str__(self) -> str:
        return f"({f' {self.word} '.join(map(str, self.parts))})"


class And(CombinedGate):
    """Open as far as both gates are, closed as far as either is."""

    word = "and"

    def decision(self, ctx: ForwardContext, names: Iterator[str]) -> Decision:
        first, second = [part.decision(ctx, names) for part in self.parts]
        return conjunction(first, second)


class Or(CombinedGate):
    """Open as far as either gate is, closed as far as both are."""

    word = "or"

    def decision(self, ctx: ForwardContext, names: Iterator[str]) -> Decision:
        first, second = [part.decision(ctx, names) for part in self.parts]
        return negation(conjunction(negation(first), negation(second)))


class Not(CombinedGate):
    """Open as far as the gate is closed."""

    word = "not"

    def decision(self, ctx: ForwardContext, names: Iterator[str]) -> Decision:
        return negation(self.parts[0].decision(ctx, names))

    def __str__(self) -> str:
        return f"not {self.parts[0]}"


COMBINATIONS = {combination.word: combination for combination in (And, Or, Not)}


class SiteGate(Gate, TensorHolder):
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

    An activation that is NaN gives a margin that is NaN, and nothing looks for it while a model runs: a comparison does not open there (its
    negation does), and a soft gate makes the edited activation NaN.

    Raises:
        ConfigError, SiteError, NonFiniteError.
    """

    is_tried: ClassVar[bool] = True  # before hooks are installed, on a small pass that no model makes

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
                raise _wrong_sharpness(self.name, sharpness)
        TensorHolder.__init__(self, tensors, width)
        for name, tensor in tensors.items():
            if tensor.shape[0] != 1:
                raise _several_entries(self.name, name, tensor)
        self.site = None if site is None else Site.parse(site)
        self.per = _checked_choice(per, PER, "per")
        self.pool = _checked_choice(pool, POOLS, "pool")
        self.over = Scope.parse(over)
        if self.over.half_life is not None:
            raise _fading_scope(self.name, self.over)
        self._over_mask = ScopeMask(self.over)
        self.number = next(_NUMBERS)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """How far each token is beyond the threshold, [batch, tokens] fp32 or fp64; open above 0. h: [batch, tokens, width]."""
        raise NotImplementedError

    def site_gates(self) -> Iterator[SiteGate]:
        yield self

    def copied(self, tensors: dict[int, Tensor], gates: dict[int, Gate]) -> Gate:
        if id(self) not in gates:
            gates[id(self)] = self.copy(tensors)
        return gates[id(self)]

    @property
    def is_soft(self) -> bool:
        """It opens by degrees."""
        return "sharpness" in self.tensors

    def train(self) -> Self:
        """Makes the learnable tensors parameters. Raises ConfigError for a comparison, which has no gradient."""
        if not self.is_soft:
            raise _hard_gate(self.name)
        return super().train()

    def read(self, h: Tensor, ctx: ForwardContext, name: str) -> None:
        """Decides, and leaves the decision in the scratch space of the pass under its name. h: [batch, tokens, width]."""
        if self.per == "token":
            decision = self._switch(self.margin(h, ctx))
        elif self.per == "generation" and ctx.phase == "generate":
            # with the number, since a cache may outlive the plan: what another gate decided must not be taken for this one's
            pair = ctx.remember(f"{name} number {self.number}", lambda: as_pair(self._of_rows(h, ctx))[:, -1:])
            decision = Decision(pair[..., :1], pair[..., 1:])
        else:
            decision = self._of_rows(h, ctx)
        ctx.scratch.decisions[name] = decision
        if self.is_soft and ctx.phase == "train":
            without_gradient = ctx.scratch.without_gradient
            (without_gradient.discard if torch.is_grad_enabled() else without_gradient.add)(name)

    def note_lengths(self, ctx: ForwardContext) -> None:
        """See `ScopeMask.note_lengths`."""
        if self.per != "token":
            self._over_mask.note_lengths(ctx)

    def decision(self, ctx: ForwardContext, names: Iterator[str]) -> Decision:
        name = next(names)
        decision = ctx.scratch.decisions.get(name)
        if name in ctx.scratch.without_gradient and torch.is_grad_enabled():
            raise _decided_without_gradient(self.name)
        if decision is None:
            raise _undecided(self.name, self.site)
        return decision

    def _switch(self, margin: Tensor) -> Decision:
        """margin: [batch, tokens]; the decision has a last dimension of 1."""
        opened = torch.sigmoid(self.tensors["sharpness"] * margin) if self.is_soft else (margin > 0).to(margin.dtype)
        return Decision(opened.unsqueeze(-1))

    def _of_rows(self, h: Tensor, ctx: ForwardContext) -> Decision:
        """[batch, 1, 1], or [batch, tokens, 1] where a row may hold several texts."""
        if ctx.is_paged:
            ctx.check_generation_is_clear()
        margin = self.margin(h, ctx)
        counted = self._counted_tokens(ctx)
        if counted.shape != margin.shape:
            counted = ctx.at_unembedded(counted, margin.shape[1])
        counted = counted.to(margin.device)  # a model may lie on several
        starts = None if ctx.phase == "generate" else ctx.starts
        if starts is None:
            count, pooled = self._pooled_over_rows(margin, counted)
            return decided_where(count > 0, self._switch(pooled))
        text = starts.to(margin.device).long().cumsum(1)  # [batch, tokens] number of the text of each token
        count, pooled = self._pooled_over_texts(margin, counted, text)
        decision = decided_where(count > 0, self._switch(pooled))  # [batch, texts + 1, 1]
        assert decision.closed is not None
        per_token = text.unsqueeze(-1)  # [batch, tokens, 1]
        return Decision(decision.opened.gather(1, per_token), decision.closed.gather(1, per_token))

    def _pooled_over_rows(self, margin: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        count = counted.sum(1, keepdim=True)  # [batch, 1]
        if self.pool == "max":
            return count, margin.masked_fill(~counted, -torch.inf).amax(1, keepdim=True)
        return count, torch.where(counted, margin, 0.0).sum(1, keepdim=True) / count.clamp_min(1)

    def _pooled_over_texts(self, margin: Tensor, counted: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        per_text = margin.new_zeros(margin.shape[0], margin.shape[1] + 1)  # [batch, texts + 1]
        count = per_text.scatter_add(1, text, counted.to(margin.dtype))
        if self.pool == "max":
            return count, per_text.scatter_reduce(1, text, margin.masked_fill(~counted, -torch.inf), "amax", include_self=False)
        return count, per_text.scatter_add(1, text, torch.where(counted, margin, 0.0)) / count.clamp_min(1)

    def _counted_tokens(self, ctx: ForwardContext) -> Tensor:
        mask: Mask = self._over_mask.mask(ctx)
        return mask if isinstance(mask, Tensor) else ctx.real & mask

    def options(self) -> dict[str, Any]:
        site = None if self.site is None else str(self.site)
        return {"site": site, "per": self.per, "over": str(self.over), "pool": self.pool}

    def to_dict(self) -> dict[str, Any]:
        name, options = file_form(self, GATES)
        return {"gate": name, "options": options}

    def __repr__(self) -> str:
        return TensorHolder.__repr__(self)

    def __str__(self) -> str:
        where = "" if self.site is None else f" at {self.site}"
        return f"{self.name}{where} per {self.per}"


GATES: Registry[type[SiteGate]] = Registry("gate", "steer.intervene.gates", "steer.gates", subclass_of=SiteGate)


def from_dict(spec: dict[str, Any], tensors: Iterator[dict[str, Tensor]]) -> Gate:
    """Inverse of `Gate.to_dict`. tensors: those of each site gate, from left to right."""
    if "gate" in spec:
        if unknown := spec.keys() - {"gate", "options"}:
            raise TypeError(f"a gate has no '{min(unknown)}'")
        return GATES.get(spec["gate"]).restore(next(tensors), spec["options"])
    [(word, parts)] = spec.items()
    wanted = 1 if COMBINATIONS[word] is Not else 2
    if not isinstance(parts, list) or len(parts) != wanted:
        raise TypeError(f"gate '{word}' of {parts!r}, which takes {wanted} gates")
    return COMBINATIONS[word](*(from_dict(part, tensors) for part in parts))


def one_number(value: float | Tensor, what: str) -> Tensor:
    """[1] fp32. Raises ConfigError for anything but one number."""
    number = tensor_of(value, what, "pass a number")
    if number.numel() != 1:
        raise ConfigError(f"{what} is not one number", expected="one number for all rows", found=list(number.shape), remedy="pass a number")
    return number.detach().to(torch.float32, copy=True).reshape(1)


def _checked_gate(gate: Any) -> Gate:
    of_type(gate, Gate, "a part of a combined gate", "combine gates with gates, e.g. first & ~second")
    return gate


def _checked_choice(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        remedy = did_you_mean(str(value), known) or "choose one of these"
        raise ConfigError(f"unknown '{what}' of a gate", expected=f"one of {', '.join(known)}", found=value, remedy=remedy)
    return value


# ---- errors


def _python_words() -> ConfigError:
    return ConfigError(
        "gates do not combine by and, or, not",
        expected="& for and, | for or, ~ for not",
        found="Python's own words, which would drop one of the gates",
        remedy="e.g. (first & ~second)",
    )


def _unknown_combination(gate: CombinedGate) -> ConfigError:
    return ConfigError(
        "a file cannot name this combination of gates",
        expected="one made by &, | or ~",
        found=f"{type(gate).__module__}.{type(gate).__qualname__}, which would be read as '{gate.word}'",
        remedy="say the same with &, | and ~, or in a registered gate of your own",
    )


def _wrong_sharpness(name: str, sharpness: float | Tensor) -> ConfigError:
    return ConfigError(
        f"sharpness of gate '{name}'",
        expected="a positive number, or None for a comparison",
        found=sharpness,
        remedy="e.g. 10.0",
    )


def _several_entries(gate: str, name: str, tensor: Tensor) -> ConfigError:
    return ConfigError(
        f"gate '{gate}' has several entries of '{name}'",
        expected="one for all rows",
        found=list(tensor.shape),
        remedy="combine one gate for each of them with | or &",
    )


def _fading_scope(name: str, over: Scope) -> ConfigError:
    return ConfigError(
        f"gate '{name}' cannot look at tokens that fade",
        expected="a scope without '~'",
        found=str(over),
        remedy="put the half-life into the scope of the intervention",
    )


def _hard_gate(name: str) -> ConfigError:
    return ConfigError(
        f"gate '{name}' compares, which cannot be learned",
        expected="a soft gate",
        found="sharpness=None",
        remedy="make it with sharpness=..., e.g. 10.0",
    )


def _decided_without_gradient(name: str) -> ContextError:
    return ContextError(
        f"soft gate '{name}' decided where no gradients are recorded",
        expected="a decision that gradients go through",
        found="a site inside a block under reentrant gradient checkpointing, and a steered site outside of it",
        remedy="use gradient_checkpointing_enable({'use_reentrant': False}), or read the output of a block",
    )


def _undecided(name: str, site: Site | None) -> ContextError:
    return ContextError(
        f"gate '{name}' did not decide before the activation that it is for was reached",
        expected="its site to run first" if site is None else f"'{site}' to run first",
        found="it has not run in this pass",
        remedy="let the gate read a site that comes before the steered one",
    )
