"""ScopeMask: finds the tokens of a scope in a forward pass."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.intervene.scope import Scope, Selector, Window
from steer.model.context import CHAT_ROLES, ForwardContext, Mask, index_within

_NO_STOP = 2**62  # of a window whose end is open


class WindowBounds:
    """The bounds of a window as a tensor, so that compiled code sees them move.

    Attributes:
        bounds: [2] start and stop.
        counts_from_end: some numbers are negative; compiled code is bound to this, not to the bounds.
    """

    def __init__(self, window: Window) -> None:
        self.indices = window.indices
        with torch.inference_mode(False):  # it may be moved outside
            self.bounds = torch.zeros(2, dtype=torch.long)
        self.move(window)

    def move(self, window: Window) -> None:
        """Takes the bounds of another window, in place."""
        self.counts_from_end = window.counts_from_end
        with torch.inference_mode(False):
            self.bounds.copy_(torch.tensor([window.start or 0, _NO_STOP if window.stop is None else window.stop]))

    def holds(self, index: Tensor, from_end: Tensor | None) -> Tensor:
        """[batch, tokens] bool. index: from 0 at the first token; from_end: -1 at the last, None where the end is not known."""
        if self.indices:
            ends = [(number, from_end if number < 0 else index) for number in self.indices]
            hits = [where == number for number, where in ends if where is not None]
            return reduce(operator.or_, hits) if hits else torch.zeros_like(index, dtype=torch.bool)
        start, stop = self.bounds
        if from_end is None:
            return (index >= start) & (index < stop) & (start >= 0) & (stop >= 0)
        return torch.where(start < 0, from_end, index).ge(start) & torch.where(stop < 0, from_end, index).lt(stop)


@dataclass(eq=False)
class _Part:
    """A selector with the tensors that it compares with.

    Attributes:
        window: of a selector that counts tokens, or None.
        ids: token ids of a selector that names some, or None.
    """

    selector: Selector
    window: WindowBounds | None
    ids: Tensor | None

    @classmethod
    def of(cls, selector: Selector) -> _Part:
        window = None if selector.window is None else WindowBounds(selector.window)
        with torch.inference_mode(False):
            ids = torch.tensor(selector.ids) if selector.ids else None
        return cls(selector, window, ids)

    def move(self, device: torch.device) -> None:
        self.ids = None if self.ids is None else self.ids.to(device)
        if self.window is not None:
            self.window.bounds = self.window.bounds.to(device)


class ScopeMask:
    """The tokens of a scope, pass by pass.

    Attributes:
        scope: with the window where it is now.
        device: where the tensors lie that token ids and positions are compared with.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.device = torch.device("cpu")
        self._include = [[_Part.of(selector) for selector in intersection] for intersection in scope.include]
        self._exclude = [[_Part.of(selector) for selector in intersection] for intersection in scope.exclude]
        self._parts = [part for intersection in (*self._include, *self._exclude) for part in intersection]
        with torch.inference_mode(False):
            self._half_life = None if scope.half_life is None else torch.tensor(scope.half_life)
        windowed = {selector.kind for selector in scope.selectors if selector.window is not None}
        self._counts_from_prompt = scope.half_life is not None or not windowed.isdisjoint(("response", "generated"))
        self._counts_tokens = self._counts_from_prompt or bool(windowed)
        self._is_everything = str(scope) == "all"

    def set_window(self, scope: Scope) -> None:
        """Moves the one slice to where it is in a scope that differs in nothing else, in place."""
        assert scope.window is not None
        for part in self._parts:
            if part.window is not None and part.selector.is_sliced:
                part.window.move(scope.window)
        self.scope = scope

    def note_lengths(self, ctx: ForwardContext) -> None:
        """Notes on the cache, when a pass opens, the lengths that later passes of the generation count from."""
        if self._counts_tokens and ctx.tokens:
            ctx.note_lengths(of_prompt=self._counts_from_prompt)

    def mask(self, ctx: ForwardContext) -> Mask:
        """[batch, tokens] bool, or True / False when no tensor is needed to tell. Raises ContextError when the pass does not say."""
        if ctx.device is not None and ctx.device != self.device:  # that of the token ids, not of the site
            self._move(ctx.device)
        if self._is_everything:
            return ctx.attention
        if ctx.tokens == 0:
            raise _needs_tokens(self.scope)
        selected = self._of_union(self._include, ctx)
        if self._exclude:
            selected = both(selected, negate(self._of_union(self._exclude, ctx)))
        mask = both(ctx.attention, selected)
        return mask.expand(ctx.batch, ctx.tokens) if isinstance(mask, Tensor) else mask  # positions may be the same in every row

    def fade(self, ctx: ForwardContext) -> Tensor | None:
        """[batch, tokens] fp32 factor of the decay, 1 on prompt tokens; None for no decay. Raises ContextError as `mask` does."""
        if self._half_life is None or ctx.tokens == 0:
            return None
        if ctx.phase == "generate":
            index = (ctx.positions - ctx.prompt_length).clamp_min(0)
        elif ctx.labelled is None:
            raise _unknown_response_start(self.scope)
        else:
            index = torch.where(ctx.labelled, index_within(ctx.labelled & ctx.real, ctx.starts), 0)
        return torch.exp2(-index / self._half_life).expand(ctx.batch, ctx.tokens)

    def _of_union(self, union: list[list[_Part]], ctx: ForwardContext) -> Mask:
        hits: Mask = False
        for intersection in union:
            common: Mask = True
            for part in intersection:
                common = both(common, self._of_part(part, ctx))
                if ctx.leading and part.selector.kind != "all":  # a soft prompt is steered as `all` only: it belongs to no text
                    common = both(common, ctx.in_text)
            hits = either(hits, common)
        return hits

    def _of_part(self, part: _Part, ctx: ForwardContext) -> Mask:
        """[batch, tokens] bool, padding not yet taken out, or a constant."""
        selector, window = part.selector, part.window
        kind = selector.kind
        if kind == "all":
            return True
        if kind == "last":
            return ctx.last
        if kind == "tokens":
            return _of_ids(part, ctx)
        if kind == "image":
            return _of_images(part.selector, ctx)
        if kind == "role":
            return _of_roles(selector, ctx)
        if kind == "positions":
            assert window is not None
            return _in_positions(window, ctx)
        if ctx.phase == "generate":
            return _in_generation(selector, window, ctx)
        return self._in_training(selector, window, ctx)

    def _in_training(self, selector: Selector, window: WindowBounds | None, ctx: ForwardContext) -> Mask:
        if ctx.labelled is None:
            raise _unknown_parts(self.scope)
        if selector.kind == "generated":
            return False
        part = both(~ctx.labelled if selector.kind == "prompt" else ctx.labelled, ctx.in_text)
        assert isinstance(part, Tensor)
        if window is None:
            return part
        part = part & ctx.real
        last = ctx.last
        ends = None if ctx.starts is None or not isinstance(last, Tensor) else last.flip(1)
        from_end = -1 - index_within(part.flip(1), ends).flip(1)
        return part & window.holds(index_within(part, ctx.starts), from_end)

    def _move(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self._half_life = None if self._half_life is None else self._half_life.to(device)
            for part in self._parts:
                part.move(device)


def _of_ids(part: _Part, ctx: ForwardContext) -> Mask:
    if ctx.ids is None:
        raise _needs_ids(part.selector)
    assert part.ids is not None
    return torch.isin(ctx.ids, part.ids)


def _of_images(selector: Selector, ctx: ForwardContext) -> Mask:
    if not ctx.image_ids:
        raise no_images(str(selector))
    if ctx.ids is None:
        raise _needs_ids(selector)
    hits: Mask = False
    for image_id in ctx.image_ids:
        hits = either(hits, ctx.ids == image_id)
    return hits


def _in_positions(window: WindowBounds, ctx: ForwardContext) -> Mask:
    decoded = ctx.generated  # such tokens have no distance from the end
    if isinstance(decoded, Tensor):
        return torch.where(decoded, window.holds(ctx.positions, None), window.holds(ctx.positions, ctx.from_end))
    return window.holds(ctx.positions, None if decoded else ctx.from_end)


def _in_generation(selector: Selector, window: WindowBounds | None, ctx: ForwardContext) -> Mask:
    if selector.kind == "prompt":
        member = negate(ctx.generated)
        return member if member is False or window is None else both(member, window.holds(ctx.positions, ctx.from_end))
    member = ctx.generated
    if window is None:
        return member
    if window.counts_from_end:
        raise _no_known_end(selector)
    return member if member is False else both(member, window.holds(ctx.positions - ctx.prompt_length, None))


def _of_roles(selector: Selector, ctx: ForwardContext) -> Mask:
    if ctx.phase == "generate" and ctx.decoding:
        return ctx.generated if "assistant" in selector.roles else False
    if ctx.turns is None or ctx.turns.shape != (ctx.batch, ctx.tokens):
        raise _unknown_turns(selector, ctx)
    hits: Mask = False
    for role in selector.roles:
        hits = either(hits, ctx.turns == CHAT_ROLES.index(role))
    return hits


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
    """Complement that stays a constant where it can."""
    return ~mask if isinstance(mask, Tensor) else not mask


# ---- errors


def _needs_tokens(scope: Scope) -> ContextError:
    return ContextError(
        f"scope '{scope}' needs tokens",
        expected="a site of a decoder, or the scope 'all'",
        found="a module that is no part of a decoder, whose passes have no tokens",
        remedy="use scope='all'",
    )


def no_images(scope: str) -> ContextError:
    """The model is none that reads images."""
    return ContextError(
        f"scope '{scope}' needs a vision-language model",
        expected="a config with image_token_id, the id that stands for images in the text",
        found="none",
        remedy="use tokens[<id>] where you know the id, or another scope",
    )


def _no_known_end(selector: Selector) -> ContextError:
    return ContextError(
        f"'{selector}' counts from an end that is not known while decoding",
        expected="a window from the start of the response",
        found="a pass of a generation",
        remedy="keep it to training with phases=('train', 'validate'), or count from the start",
    )


def _unknown_parts(scope: Scope) -> ContextError:
    return ContextError(
        f"scope '{scope}' cannot tell prompt from response in this forward pass",
        expected="labels, a cache (past_key_values or use_cache=True), or an announced response mask",
        found="none of them; with use_cache=False generated tokens look like a prompt",
        remedy="pass labels=..., use the cache, or wrap the call in `with steer.response_tokens(model, mask):`",
    )


def _unknown_response_start(scope: Scope) -> ContextError:
    return ContextError(
        f"scope '{scope}' cannot tell where the response begins",
        expected="labels, a cache, or an announced response mask",
        found="none of them",
        remedy="pass labels=..., use the cache, or wrap the call in `with steer.response_tokens(model, mask):`",
    )


def _needs_ids(selector: Selector) -> ContextError:
    return ContextError(
        f"'{selector}' needs token ids",
        expected="input_ids in the forward pass",
        found="inputs_embeds",
        remedy="pass input_ids, or choose another scope",
    )


def _unknown_turns(selector: Selector, ctx: ForwardContext) -> ContextError:
    return ContextError(
        f"'{selector}' cannot tell whose turn a token belongs to",
        expected=f"[{ctx.batch}, {ctx.tokens}] announced roles",
        found="none" if ctx.turns is None else list(ctx.turns.shape),
        remedy="wrap the call in `with steer.chat_roles(model, roles):`, roles from steer.model.tokens.encode_chat",
    )
