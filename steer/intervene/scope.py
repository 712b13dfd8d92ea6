"""Scope: on which tokens an intervention acts. Padding is never among them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from steer.errors import ConfigError, ContextError
from steer.model.context import ForwardContext, Mask
from steer.model.site import did_you_mean

KINDS = {
    "all": "every token",
    "prompt": "tokens without a label in training; the given tokens in generation",
    "response": "tokens with a label in training; the decoded tokens in generation",
    "generated": "decoded tokens, in generation only",
    "last": "the last token of each row or packed segment; in generation the newest one",
    "positions[...]": "listed positions of each text; 0 is its first real token, -1 the last of the prompt or training row",
}
_POSITIONS = re.compile(r"positions\[\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\]")


@dataclass(frozen=True)
class Scope:
    """A set of tokens, named by a rule."""

    kind: str
    positions: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Reads a key of `KINDS`, e.g. `response` or `positions[0,-1]`. Raises ConfigError."""
        if isinstance(text, Scope):
            return text
        if match := _POSITIONS.fullmatch(text):
            return cls("positions", tuple(int(number) for number in match[1].split(",")))
        if text in KINDS and "[" not in text:
            return cls(text)
        remedy = did_you_mean(text, KINDS) or "choose one of these, e.g. 'response' or 'positions[0,-1]'"
        raise ConfigError(f"unknown scope '{text}'", expected=", ".join(KINDS), found=text, remedy=remedy)

    def __str__(self) -> str:
        return f"positions[{','.join(map(str, self.positions))}]" if self.positions else self.kind

    def mask(self, ctx: ForwardContext) -> Mask:
        """[batch, tokens] bool, or True / False when no tensor is needed to tell. Raises ContextError when the pass does not say."""
        if self.kind == "all":
            return ctx.attention
        if ctx.tokens == 0:
            raise ContextError(
                f"scope '{self}' needs tokens",
                expected="a site of a decoder, or the scope 'all'",
                found="a module that is no part of a decoder, whose passes have no tokens",
                remedy="use scope='all'",
            )
        if self.kind == "last":
            return ctx.last
        if self.kind == "positions":
            return self._listed(ctx)
        if ctx.phase == "generate":
            return both(ctx.attention, ctx.generated if self.kind != "prompt" else negate(ctx.generated))
        if ctx.labelled is None:
            raise ContextError(
                f"scope '{self}' cannot tell prompt from response in this forward pass",
                expected="labels, a cache (past_key_values or use_cache=True), or an announced response mask",
                found="none of them; with use_cache=False generated tokens look like a prompt",
                remedy="pass labels=..., use the cache, or wrap the call in `with steer.response_tokens(model, mask):`",
            )
        if self.kind == "generated":
            return False
        return both(ctx.attention, ctx.labelled if self.kind == "response" else ~ctx.labelled)

    def _listed(self, ctx: ForwardContext) -> Mask:
        forward = [position for position in self.positions if position >= 0]
        backward = [position for position in self.positions if position < 0]
        hits: Mask = False
        if forward:
            hits = _isin(ctx.positions, forward).expand(ctx.batch, ctx.tokens)
        if backward and (given := negate(ctx.generated)) is not False:  # decoded tokens have no distance from the end
            counted = both(given, _isin(ctx.from_end, backward))
            hits = counted if hits is False else hits | counted
        return both(ctx.attention, hits)


def _isin(positions: Tensor, wanted: list[int]) -> Tensor:
    hits = positions == wanted[0]
    for position in wanted[1:]:
        hits = hits | (positions == position)
    return hits


def both(a: Mask, b: Mask) -> Mask:
    """Conjunction that stays a constant where it can."""
    if a is False or b is False:
        return False
    if a is True:
        return b
    return a if b is True else a & b


def negate(mask: Mask) -> Mask:
    return ~mask if isinstance(mask, Tensor) else not mask
