"""Scope: on which tokens an intervention acts. Padding is never among them.

A scope is written as text: `response`, `generated[:32]`, `prompt[-4:]|response!tokens[2]`, `generated~64`.

    scope    = union { "!" union } [ "~" half-life ]     what is excluded wins, wherever it stands
    union    = both { "|" both }
    both     = selector { "&" selector }
    selector = a key of KINDS, with its argument in square brackets

Windows are half-open, as Python's slices are: `[:32]` the first 32 tokens, `[32:]` those after them, `[-4:]` the last four, and `[0,-1]`
single ones. They count tokens within the part that is named, in each text of its own, so neither padding nor packing shifts them. The
half-life fades the edit over the response: after so many of its tokens it is half as strong.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.errors import ConfigError, ContextError, did_you_mean
from steer.model.context import CHAT_ROLES, ForwardContext, Mask, index_within

KINDS = {
    "all": "every token",
    "prompt": "tokens without a label in training; the given tokens in generation",
    "response": "tokens with a label in training; the decoded tokens in generation",
    "generated": "decoded tokens, in generation only",
    "last": "the last token of each row or packed segment; in generation the newest one",
    "positions[...]": "a window of each text; 0 is its first real token, -1 the last of the prompt or training row",
    "tokens[...]": "tokens with one of these ids",
    "role[...]": "turns of system, user, assistant or tool, as announced by steer.chat_roles",
}
_WINDOWED = ("prompt", "response", "generated", "positions")
_SELECTOR = re.compile(r"([a-z]+)(?:\[([^\[\]]*)\])?")
_SLICE = re.compile(r"\s*(-?[0-9]{1,9})?\s*:\s*(-?[0-9]{1,9})?\s*")
_INDICES = re.compile(r"\s*-?[0-9]{1,9}\s*(,\s*-?[0-9]{1,9}\s*)*")
_IDS = re.compile(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")
_NUMBER = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*")
_END = 2**62  # of a window that has none


class Window:
    """A set of indices, half-open, kept as tensors so that compiled code sees them change.

    Attributes:
        start, stop: as in a slice, None for an open end; `listed` single indices instead.
        counts_from_end: some of these numbers are negative.
    """

    def __init__(self, text: str, what: str) -> None:
        self.listed: list[int] = []
        self.start: int | None = None
        self.stop: int | None = None
        with torch.inference_mode(False):  # it may be moved outside
            self.bounds = torch.zeros(2, dtype=torch.long)
        if match := _SLICE.fullmatch(text):
            self.set(*(int(end) if end else None for end in match.groups()))
        elif _INDICES.fullmatch(text):
            self.listed = [int(number) for number in text.split(",")]
            self.counts_from_end = min(self.listed) < 0
        else:
            raise ConfigError(
                f"'{what}' has no window",
                expected="a slice such as [:32] or [-4:], or indices such as [0,-1]",
                found=f"[{text}]",
                remedy=f"write e.g. '{what.split('[')[0]}[0:8]'",
            )

    @staticmethod
    def check(start: int | None, stop: int | None) -> None:
        """Raises ConfigError for a slice that holds nothing."""
        first = start or 0
        if stop is not None and (first < 0) == (stop < 0) and first >= stop:
            raise ConfigError(
                "a window is empty",
                expected="a start before the stop",
                found=f"[{start}:{stop}]",
                remedy="change the bounds; to switch an intervention off, call plan.enable(False)",
            )

    def set(self, start: int | None, stop: int | None) -> None:
        """Changes a slice in place."""
        self.check(start, stop)
        self.start, self.stop = start, stop
        self.counts_from_end = min(start or 0, stop or 0) < 0  # compiled code is bound to this, not to the bounds
        with torch.inference_mode(False):
            self.bounds.copy_(torch.tensor([start or 0, _END if stop is None else stop]))

    def __str__(self) -> str:
        if self.listed:
            return ",".join(map(str, self.listed))
        return ":".join("" if end is None else str(end) for end in (self.start, self.stop))

    def holds(self, index: Tensor, from_end: Tensor | None) -> Tensor:
        """[batch, tokens] bool. index: from 0 at the first; from_end: -1 at the last, None where the end is not known."""
        if self.listed:
            ends = [(number, from_end if number < 0 else index) for number in self.listed]
            hits = [where == number for number, where in ends if where is not None]
            return reduce(operator.or_, hits) if hits else torch.zeros_like(index, dtype=torch.bool)
        start, stop = self.bounds
        if from_end is None:
            return (index >= start) & (index < stop) & (start >= 0) & (stop >= 0)
        return torch.where(start < 0, from_end, index).ge(start) & torch.where(stop < 0, from_end, index).lt(stop)


@dataclass
class Selector:
    """One named set of tokens, of which `window` leaves some."""

    kind: str
    window: Window | None = None
    ids: Tensor | None = None
    roles: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selector:
        if not text.strip():
            raise ConfigError(
                "a part of the scope is empty",
                expected="a selector on both sides of '|' and '&', and before and after '!'",
                found="nothing",
                remedy="name one there; everything but the prompt is 'all!prompt'",
            )
        match = _SELECTOR.fullmatch(text.strip())
        kind, argument = (match[1], match[2]) if match else (text, None)
        known = {name.split("[")[0]: name for name in KINDS}
        if kind not in known:
            remedy = did_you_mean(kind, known) or "choose one of these, e.g. 'response' or 'positions[0,-1]'"
            raise ConfigError(f"unknown scope '{text}'", expected=", ".join(KINDS), found=text, remedy=remedy)
        if "[" in known[kind] and argument is None or argument is not None and "[" not in known[kind] and kind not in _WINDOWED:
            expected = known[kind] if argument is None else kind
            raise ConfigError(
                f"unknown scope '{text}'", expected=expected, found=text, remedy="see steer.intervene.scope.KINDS for what each one takes"
            )
        if argument is None:
            return cls(kind)
        if kind == "tokens":
            if not _IDS.fullmatch(argument):
                raise ConfigError(
                    f"'{text}' names no tokens",
                    expected="token ids, e.g. tokens[2,198]",
                    found=argument,
                    remedy="take ids from the tokenizer: tokenizer.convert_tokens_to_ids(...)",
                )
            return cls(kind, ids=torch.tensor([int(number) for number in argument.split(",")]))
        if kind == "role":
            roles = tuple(role.strip() for role in argument.split(","))
            if unknown := [role for role in roles if role not in CHAT_ROLES]:
                remedy = did_you_mean(unknown[0], CHAT_ROLES) or "choose one of these"
                raise ConfigError(f"unknown chat role in '{text}'", expected=", ".join(CHAT_ROLES), found=unknown[0], remedy=remedy)
            return cls(kind, roles=roles)
        window = Window(argument, text)
        if kind == "generated" and window.counts_from_end:
            raise ConfigError(
                f"'{text}' counts from an end that is not known while decoding",
                expected="indices from 0 on",
                found=str(window),
                remedy="count from the first generated token, e.g. generated[:32]",
            )
        return cls(kind, window)

    def __str__(self) -> str:
        argument = self.window or (",".join(map(str, self.ids.tolist())) if self.ids is not None else ",".join(self.roles))
        return f"{self.kind}[{argument}]" if str(argument) else self.kind

    def mask(self, ctx: ForwardContext, scope: Scope) -> Mask:
        """[batch, tokens] bool, padding not yet taken out, or a constant."""
        if self.kind == "all":
            return True
        if self.kind == "last":
            return ctx.last
        if self.kind == "tokens":
            return self._of_ids(ctx)
        if self.kind == "role":
            return self._of_roles(ctx)
        if self.kind == "positions":
            assert self.window is not None
            decoded = ctx.generated  # such tokens have no distance from the end
            if isinstance(decoded, Tensor):
                return torch.where(decoded, self.window.holds(ctx.positions, None), self.window.holds(ctx.positions, ctx.from_end))
            return self.window.holds(ctx.positions, None if decoded else ctx.from_end)
        return self._part(ctx, scope)

    def _part(self, ctx: ForwardContext, scope: Scope) -> Mask:
        wants_prompt, window = self.kind == "prompt", self.window
        if ctx.phase == "generate":
            member = negate(ctx.generated) if wants_prompt else ctx.generated
            if window is None:
                return member
            if wants_prompt:
                return False if member is False else both(member, window.holds(ctx.positions, ctx.from_end))
            length = ctx.prompt_length  # read in the prompt's pass too, which is where it is known
            if self.window and self.window.counts_from_end:
                raise ContextError(
                    f"'{self}' counts from an end that is not known while decoding",
                    expected="a window from the start of the response",
                    found="a pass of a generation",
                    remedy="keep it to training with phases=('train', 'validate'), or count from the start",
                )
            return False if member is False else both(member, window.holds(ctx.positions - length, None))
        if ctx.labelled is None:
            raise ContextError(
                f"scope '{scope}' cannot tell prompt from response in this forward pass",
                expected="labels, a cache (past_key_values or use_cache=True), or an announced response mask",
                found="none of them; with use_cache=False generated tokens look like a prompt",
                remedy="pass labels=..., use the cache, or wrap the call in `with steer.response_tokens(model, mask):`",
            )
        if self.kind == "generated":
            return False
        part = ~ctx.labelled if wants_prompt else ctx.labelled
        if window is None:
            return part
        part = part & ctx.real
        last = ctx.last
        ends = None if ctx.starts is None or not isinstance(last, Tensor) else last.flip(1)
        backwards = -1 - index_within(part.flip(1), ends).flip(1)
        return part & window.holds(index_within(part, ctx.starts), backwards)

    def _of_ids(self, ctx: ForwardContext) -> Mask:
        if ctx.ids is None:
            raise ContextError(
                f"'{self}' needs token ids",
                expected="input_ids in the forward pass",
                found="inputs_embeds",
                remedy="pass input_ids, or choose another scope",
            )
        assert self.ids is not None
        return torch.isin(ctx.ids, self.ids)

    def _of_roles(self, ctx: ForwardContext) -> Mask:
        if ctx.phase == "generate" and ctx.decoding:
            return ctx.generated if "assistant" in self.roles else False
        if ctx.turns is None or ctx.turns.shape != (ctx.batch, ctx.tokens):
            raise ContextError(
                f"'{self}' cannot tell whose turn a token belongs to",
                expected=f"[{ctx.batch}, {ctx.tokens}] announced roles",
                found="none" if ctx.turns is None else list(ctx.turns.shape),
                remedy="wrap the call in `with steer.chat_roles(model, roles):`, roles from steer.model.tokens.encode_chat",
            )
        hits: Mask = False
        for role in self.roles:
            hits = either(hits, ctx.turns == CHAT_ROLES.index(role))
        return hits

    def to(self, device: torch.device) -> None:
        if self.ids is not None:
            self.ids = self.ids.to(device)
        if self.window is not None:
            self.window.bounds = self.window.bounds.to(device)


class Scope:
    """A set of tokens, named by a rule.

    Attributes:
        include: union of intersections of selectors; exclude likewise, and it wins.
        half_life: [] fp32, response tokens after which the edit is half as strong; None for no decay.
    """

    def __init__(self, include: list[list[Selector]], exclude: list[list[Selector]], half_life: Tensor | None = None) -> None:
        self.include, self.exclude, self.half_life = include, exclude, half_life
        self.device = torch.device("cpu")

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Reads the text form. Raises ConfigError, which names the part that is wrong."""
        if isinstance(text, Scope):
            return text
        body, tilde, fade = str(text).partition("~")
        half_life = None
        if tilde:
            with torch.inference_mode(False):
                half_life = torch.tensor(float(fade) if _NUMBER.fullmatch(fade) else torch.nan)
            if not 0 < half_life < torch.inf:
                raise ConfigError(
                    f"scope '{text}' has no half-life",
                    expected="a positive number of tokens after '~', at the very end",
                    found=fade,
                    remedy="e.g. generated~64",
                )
        kept, *left_out = (cls._union(union) for union in body.split("!"))
        return cls(kept, [both for union in left_out for both in union], half_life)

    @staticmethod
    def _union(text: str) -> list[list[Selector]]:
        return [[Selector.parse(one) for one in part.split("&")] for part in text.split("|")]

    def __str__(self) -> str:
        texts = ["&".join(map(str, part)) for part in self.include]
        out = ["&".join(map(str, part)) for part in self.exclude]
        return "!".join(["|".join(texts), *out]) + ("" if self.half_life is None else f"~{decimal(self.half_life)}")

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Scope) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def selectors(self) -> list[Selector]:
        return [one for part in (*self.include, *self.exclude) for one in part]

    @property
    def slices(self) -> list[Window]:
        """The windows that can be moved."""
        return [one.window for one in self.selectors if one.window is not None and not one.window.listed]

    def mask(self, ctx: ForwardContext) -> Mask:
        """[batch, tokens] bool, or True / False when no tensor is needed to tell. Raises ContextError when the pass does not say."""
        if ctx.device is not None and ctx.device != self.device:  # that of the token ids, not of the site
            self.to(ctx.device)
        if ctx.tokens == 0:
            if str(self) == "all":
                return ctx.attention
            raise ContextError(
                f"scope '{self}' needs tokens",
                expected="a site of a decoder, or the scope 'all'",
                found="a module that is no part of a decoder, whose passes have no tokens",
                remedy="use scope='all'",
            )
        if self.half_life is not None and ctx.phase == "generate":
            ctx.prompt_length  # noqa: B018  (known in the prompt's pass only, where the mask may be empty)
        kept = self._of(self.include, ctx)
        if self.exclude:
            kept = both(kept, negate(self._of(self.exclude, ctx)))
        mask = both(ctx.attention, kept)
        return mask.expand(ctx.batch, ctx.tokens) if isinstance(mask, Tensor) else mask  # positions may be the same in every row

    def _of(self, union: list[list[Selector]], ctx: ForwardContext) -> Mask:
        hits: Mask = False
        for part in union:
            common: Mask = True
            for selector in part:
                common = both(common, selector.mask(ctx, self))
            hits = either(hits, common)
        return hits

    def fade(self, ctx: ForwardContext) -> Tensor | None:
        """[batch, tokens] fp32 factor of the decay, 1 on prompt tokens; None for no decay. Raises ContextError as `mask` does."""
        if self.half_life is None or ctx.tokens == 0:
            return None
        if ctx.phase == "generate":
            index = (ctx.positions - ctx.prompt_length).clamp_min(0)
        elif ctx.labelled is None:
            raise ContextError(
                f"scope '{self}' cannot tell where the response begins",
                expected="labels, a cache, or an announced response mask",
                found="none of them",
                remedy="pass labels=..., use the cache, or wrap the call in `with steer.response_tokens(model, mask):`",
            )
        else:
            index = torch.where(ctx.labelled, index_within(ctx.labelled & ctx.real, ctx.starts), 0)
        return torch.exp2(-index / self.half_life).expand(ctx.batch, ctx.tokens)

    def to(self, device: torch.device) -> None:
        """Moves what it compares with."""
        self.device = device
        for selector in self.selectors:
            selector.to(device)
        self.half_life = None if self.half_life is None else self.half_life.to(device)


def decimal(number: Tensor) -> str:
    """The shortest decimal, without an exponent, that reads back as this fp32 number."""
    return np.format_float_positional(np.float32(number.item()), trim="-")


def both(a: Mask, b: Mask) -> Mask:
    """Conjunction that stays a constant where it can."""
    if a is False or b is False:
        return False
    if a is True:
        return b
    return a if b is True else a & b


def either(a: Mask, b: Mask) -> Mask:
    """Disjunction that stays a constant where it can."""
    return negate(both(negate(a), negate(b))) if isinstance(a, bool) or isinstance(b, bool) else a | b


def negate(mask: Mask) -> Mask:
    return ~mask if isinstance(mask, Tensor) else not mask
