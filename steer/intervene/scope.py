"""Scope: on which tokens an intervention acts. Padding is never among them.

A scope is written as text: `response`, `generated[:32]`, `prompt[-4:]|response!tokens[2]`, `generated~64`.

    scope        = union { "!" union } [ "~" half-life ]     what is excluded wins, wherever it stands
    union        = intersection { "|" intersection }
    intersection = selector { "&" selector }
    selector     = a key of KINDS, with its argument in square brackets

Windows are half-open, as Python's slices are: `[:32]` the first 32 tokens, `[32:]` those after them, `[-4:]` the last four, and `[0,-1]`
single ones. They count tokens within the part that is named, in each text of its own, so neither padding nor packing shifts them. The
half-life fades the edit over the response: after so many of its tokens it is half as strong.

This file has the text form; `steer.intervene.scope_mask` finds the tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from steer.errors import ConfigError, did_you_mean
from steer.model.context import CHAT_ROLES

KINDS = {
    "all": "every token",
    "prompt": "tokens without a label in training; the given tokens in generation",
    "response": "tokens with a label in training; the decoded tokens in generation",
    "generated": "decoded tokens, in generation only",
    "last": "the last token of each row or packed segment; in generation the newest one",
    "positions[...]": "a window of each text; 0 is its first real token, -1 the last of the prompt or training row",
    "tokens[...]": "tokens with one of these ids",
    "image": "the positions of images in the text of a vision-language model",
    "role[...]": "turns of system, user, assistant or tool, as announced by steer.chat_roles",
}
_WINDOWED = ("prompt", "response", "generated", "positions")
_SELECTOR = re.compile(r"([a-z]+)(?:\[([^\[\]]*)\])?")
_SLICE = re.compile(r"\s*(-?[0-9]{1,9})?\s*:\s*(-?[0-9]{1,9})?\s*")
_INDICES = re.compile(r"\s*-?[0-9]{1,9}\s*(,\s*-?[0-9]{1,9}\s*)*")
_IDS = re.compile(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")
_NUMBER = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*")


@dataclass(frozen=True)
class Window:
    """A set of indices: a half-open slice, or a list.

    Attributes:
        start, stop: as in a slice, None for an open end.
        indices: single indices instead.

    Raises:
        ConfigError: a slice that holds nothing.
    """

    start: int | None = None
    stop: int | None = None
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        first = self.start or 0
        if self.stop is not None and (first < 0) == (self.stop < 0) and first >= self.stop:
            raise _empty_window(self.start, self.stop)

    @classmethod
    def parse(cls, text: str, selector: str) -> Window:
        """Reads what stands in the brackets of a selector."""
        if match := _SLICE.fullmatch(text):
            start, stop = (int(bound) if bound else None for bound in match.groups())
            return cls(start, stop)
        if _INDICES.fullmatch(text):
            return cls(indices=tuple(int(number) for number in text.split(",")))
        raise _no_window(text, selector)

    @property
    def counts_from_end(self) -> bool:
        """Some of its numbers are negative."""
        return min(self.indices or (self.start or 0, self.stop or 0)) < 0

    def __str__(self) -> str:
        if self.indices:
            return ",".join(map(str, self.indices))
        return ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop))


@dataclass(frozen=True)
class Selector:
    """One named set of tokens, of which `window` leaves some.

    Attributes:
        kind: a key of `KINDS` without its brackets.
        window: of a kind that counts tokens, or None.
        ids: token ids of the kind `tokens`.
        roles: names of the kind `role`.
    """

    kind: str
    window: Window | None = None
    ids: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Reads one selector. Raises ConfigError, which names what is wrong with it."""
        if not text.strip():
            raise _empty_part()
        match = _SELECTOR.fullmatch(text.strip())
        kind, argument = (match[1], match[2]) if match else (text, None)
        known = {name.split("[")[0]: name for name in KINDS}
        if kind not in known:
            raise _unknown_kind(text, kind, known)
        if "[" in known[kind] and argument is None or argument is not None and "[" not in known[kind] and kind not in _WINDOWED:
            raise _wrong_brackets(text, known[kind] if argument is None else kind)
        if argument is None:
            return cls(kind)
        if kind == "tokens":
            return cls(kind, ids=_ids(argument, text))
        if kind == "role":
            return cls(kind, roles=_roles(argument, text))
        return cls(kind, _window(argument, text, kind))

    @property
    def is_sliced(self) -> bool:
        """It has a window that can be moved."""
        return self.window is not None and not self.window.indices

    def __repr__(self) -> str:
        return f"Selector('{self}')"

    def __str__(self) -> str:
        argument = str(self.window) if self.window is not None else ",".join(map(str, self.ids or self.roles))
        return f"{self.kind}[{argument}]" if argument else self.kind


Union = tuple[tuple[Selector, ...], ...]  # a union of intersections


@dataclass(frozen=True)
class Scope:
    """A set of tokens, named by a rule.

    Attributes:
        include: union of intersections of selectors.
        exclude: likewise, and it wins.
        half_life: response tokens after which the edit is half as strong; None for no decay.

    Example:
        >>> str(Scope.parse("prompt[-4:]|response!tokens[2]"))
        'prompt[-4:]|response!tokens[2]'
    """

    include: Union
    exclude: Union = ()
    half_life: float | None = None

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Reads the text form. Raises ConfigError, which names the part that is wrong."""
        if isinstance(text, Scope):
            return text
        body, tilde, fade = str(text).partition("~")
        half_life = None
        if tilde:
            half_life = float(np.float32(fade)) if _NUMBER.fullmatch(fade) else float("nan")
            if not 0 < half_life < float("inf"):
                raise _no_half_life(text, fade)
        included, *excluded = (_parse_union(union) for union in body.split("!"))
        return cls(included, tuple(intersection for union in excluded for intersection in union), half_life)

    def __repr__(self) -> str:
        return f"Scope('{self}')"

    def __str__(self) -> str:
        included = "|".join("&".join(map(str, intersection)) for intersection in self.include)
        excluded = ["&".join(map(str, intersection)) for intersection in self.exclude]
        fade = "" if self.half_life is None else f"~{decimal(self.half_life)}"
        return "!".join([included, *excluded]) + fade

    @property
    def selectors(self) -> list[Selector]:
        """Every selector, as they stand in the text."""
        return [selector for intersection in (*self.include, *self.exclude) for selector in intersection]

    @property
    def window(self) -> Window | None:
        """The slice that can be moved; None when the scope does not have just one."""
        sliced = [selector.window for selector in self.selectors if selector.is_sliced]
        return sliced[0] if len(sliced) == 1 else None

    def without(self, text: str) -> Scope:
        """The same scope with some tokens taken out, e.g. `positions[0]`; itself where it names them as taken out."""
        taken_out = _parse_union(text)
        return replace(self, exclude=(*self.exclude, *(part for part in taken_out if part not in self.exclude)))

    def with_window(self, start: int | None, stop: int | None) -> Scope:
        """The same scope with its one slice moved. Raises ConfigError for a slice that it may not have."""
        window = Window(start, stop)

        def moved(selector: Selector) -> Selector:
            return _with_window(selector, window) if selector.is_sliced else selector

        include = tuple(tuple(map(moved, intersection)) for intersection in self.include)
        exclude = tuple(tuple(map(moved, intersection)) for intersection in self.exclude)
        return replace(self, include=include, exclude=exclude)


def decimal(number: float) -> str:
    """The shortest decimal, without an exponent, that reads back as this fp32 number."""
    return np.format_float_positional(np.float32(number), trim="-")


def _parse_union(text: str) -> Union:
    return tuple(tuple(Selector.parse(selector) for selector in part.split("&")) for part in text.split("|"))


def _with_window(selector: Selector, window: Window) -> Selector:
    if selector.kind == "generated" and window.counts_from_end:
        raise _unknown_end(str(replace(selector, window=window)), f"{window.start}:{window.stop}")
    return replace(selector, window=window)


def _window(argument: str, text: str, kind: str) -> Window:
    window = Window.parse(argument, text)
    if kind == "generated" and window.counts_from_end:
        raise _unknown_end(text, str(window))
    return window


def _ids(argument: str, text: str) -> tuple[int, ...]:
    if not _IDS.fullmatch(argument):
        raise _no_ids(text, argument)
    return tuple(int(number) for number in argument.split(","))


def _roles(argument: str, text: str) -> tuple[str, ...]:
    roles = tuple(role.strip() for role in argument.split(","))
    if unknown := [role for role in roles if role not in CHAT_ROLES]:
        raise _unknown_role(text, unknown[0])
    return roles


# ---- errors


def _empty_window(start: int | None, stop: int | None) -> ConfigError:
    return ConfigError(
        "a window is empty",
        expected="a start before the stop",
        found=f"[{start}:{stop}]",
        remedy="change the bounds; to switch an intervention off, call attachment.enable(False)",
    )


def _no_window(text: str, selector: str) -> ConfigError:
    return ConfigError(
        f"'{selector}' has no window",
        expected="a slice such as [:32] or [-4:], or indices such as [0,-1]",
        found=f"[{text}]",
        remedy=f"write e.g. '{selector.split('[')[0]}[0:8]'",
    )


def _empty_part() -> ConfigError:
    return ConfigError(
        "a part of the scope is empty",
        expected="a selector on both sides of '|' and '&', and before and after '!'",
        found="nothing",
        remedy="name one there; everything but the prompt is 'all!prompt'",
    )


def _unknown_kind(text: str, kind: str, known: dict[str, str]) -> ConfigError:
    remedy = did_you_mean(kind, known) or "choose one of these, e.g. 'response' or 'positions[0,-1]'"
    return ConfigError(f"unknown scope '{text}'", expected=", ".join(KINDS), found=text, remedy=remedy)


def _wrong_brackets(text: str, expected: str) -> ConfigError:
    remedy = "see steer.intervene.scope.KINDS for what each one takes"
    return ConfigError(f"unknown scope '{text}'", expected=expected, found=text, remedy=remedy)


def _unknown_end(text: str, window: str) -> ConfigError:
    return ConfigError(
        f"'{text}' counts from an end that is not known while decoding",
        expected="indices from 0 on",
        found=window,
        remedy="count from the first generated token, e.g. generated[:32]",
    )


def _no_ids(text: str, argument: str) -> ConfigError:
    return ConfigError(
        f"'{text}' names no tokens",
        expected="token ids, e.g. tokens[2,198]",
        found=argument,
        remedy="take ids from the tokenizer: tokenizer.convert_tokens_to_ids(...)",
    )


def _unknown_role(text: str, role: str) -> ConfigError:
    remedy = did_you_mean(role, CHAT_ROLES) or "choose one of these"
    return ConfigError(f"unknown chat role in '{text}'", expected=", ".join(CHAT_ROLES), found=role, remedy=remedy)


def _no_half_life(text: str, fade: str) -> ConfigError:
    return ConfigError(
        f"scope '{text}' has no half-life",
        expected="a positive number of tokens after '~', at the very end",
        found=fade,
        remedy="e.g. generated~64",
    )
