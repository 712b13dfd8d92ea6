"""Trials of a module that is not of transformers: which axis is the batch, which argument holds token ids, what a mask hides.

Nothing of this is taken from names alone; arguments are changed and what comes of it is compared. Rows of a batch do not see each other.
Token ids are what an embedding gets, when another id at the first token is another residual stream at that token. A mask hides tokens:
another token in the place of a masked one changes nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.trial_pass import Argument, Run, first_tensor, is_mask_name, named_arguments

_SLIGHT = 1e-4  # share of a residual stream below which it counts as unchanged
_AXES = ((0, 1, 2), (1, 0, 2))  # [batch, tokens, width] and [tokens, batch, width]
Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class StackCalls:
    """What is called around and at the ends of a stack.

    Attributes:
        whole: the module that is run.
        around: modules around the stack by their paths in it, the innermost first.
        first, last: its first and its last block.
        argument: by which a block takes the stream.
        embeddings: the modules that were called with integers, by their paths: the one that is said to get the token ids, then the largest.
        embed: path of the one that is said to.
        alone: it is the only stack of the module that is run.
    """

    whole: nn.Module
    around: Mapping[str, nn.Module]
    first: nn.Module
    last: nn.Module
    argument: Argument
    embeddings: Mapping[str, nn.Module]
    embed: str | None
    alone: bool


@dataclass(frozen=True)
class Ids:
    """Token ids of a stack in the trial pass.

    Attributes:
        embedding: path of the module that gets them.
        values: [rows, tokens].
        are_first: no module mixes tokens before the stack, so that another id is another stream at this token alone.
    """

    embedding: str
    values: Tensor
    are_first: bool


@dataclass(eq=False)
class _Seen:
    """One pass: what comes into the first block and what the last one gives, the arguments around them, and the calls of embeddings."""

    start: Tensor | None = None
    end: Tensor | None = None

    def __post_init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.ids: list[tuple[str, Tensor]] = []


class CallTrials:
    """Runs a module a few times with other arguments.

    Attributes:
        axes: the order of axes of the stream that begins with batch and tokens; None where `problem` says why they are not known.
        outer: the arguments of the module that is run; `calls` of all modules around the stack.
        shape: rows and tokens.
    """

    def __init__(self, run: Run, stack: StackCalls) -> None:
        self._run = run
        self._stack = stack
        self.axes: tuple[int, ...] | None = None
        self.problem = "its residual stream is not one tensor [batch, tokens, width] with values"
        plain = self._pass()
        self.calls = plain.calls if plain is not None else {}
        self.outer = self.calls.get("", {})
        if plain is None or plain.start is None or plain.end is None or plain.end.dim() != 3 or plain.end.is_meta:
            return
        self.axes = self._axes_of(plain.end)
        if self.axes is not None:
            self.plain = _Seen(plain.start.permute(self.axes), plain.end.permute(self.axes))
            self.plain.ids = plain.ids
            self.shape = tuple(plain.end.permute(self.axes).shape[:2])

    # ---- one pass

    def _pass(self, change: Change | None = None, other_ids: int | None = None) -> _Seen | None:
        """Runs it once; None where it does not take the values.

        Args:
            change: gives the arguments of the module that is run.
            other_ids: number of the call of an embedding whose ids are another at the first token.
        """
        stack = self._stack
        seen = _Seen()
        around = {stack.whole: "", **{module: path for path, module in stack.around.items()}}
        embeddings = {module: path for path, module in stack.embeddings.items()}

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if module in around:
                seen.calls.setdefault(around[module], named_arguments(module, args, kwargs))
            if module is stack.first and seen.start is None:
                given: Any = stack.argument
                stream = args[given] if isinstance(given, int) and given < len(args) else kwargs.get(given)
                seen.start = stream.detach().clone() if isinstance(stream, Tensor) else None
            if module in embeddings and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                seen.ids.append((embeddings[module], args[0].detach().clone()))
                if len(seen.ids) - 1 == other_ids:
                    return (_with_other_first(args[0], 1), *args[1:]), kwargs
            return None

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if module is stack.last and tensor is not None and seen.end is None:
                seen.end = tensor.detach().clone()

        watched = dict.fromkeys([*around, *stack.embeddings.values(), stack.first, stack.last])
        try:
            self._run(list(watched), before, after, change)
        except Exception:  # it does not take these values
            return None
        return seen

    def _other_end(self, change: Change) -> Tensor | None:
        """[batch, tokens, width] what the last block gives for other arguments."""
        seen = self._pass(change)
        return None if seen is None or seen.end is None or self.axes is None else seen.end.permute(self.axes)

    # ---- the batch

    def _axes_of(self, plain: Tensor) -> tuple[int, ...] | None:
        """Another first row must change this row alone. In [tokens, batch] tokens must change each other, or the axes might be swapped."""
        if min(plain.shape[:2]) < 2:
            self.problem = f"the example gives {list(plain.shape)}; two rows of two tokens at least are needed to tell them apart"
            return None
        moved = {axis: list(self._changed_places(plain, axis)) for axis in (0, 1)}
        for places in (*moved[0], *moved[1]):
            if places.any() and not places[1:].any():
                return _AXES[0]
            spreads = any(bool(other[:, 1:].any()) for others in moved.values() for other in others if other is not places)
            if places.any() and not places[:, 1:].any() and spreads:
                return _AXES[1]
        self.problem = (
            f"its stream {list(plain.shape)} does not have the batch as its first axis, nor as its second: rows change each other"
        )
        if not any(bool(places.any()) for of_axis in moved.values() for places in of_axis):
            self.problem = f"no argument with a row for each of its stream {list(plain.shape)} was seen to change it"
        return None

    def _changed_places(self, plain: Tensor, axis: int) -> Iterator[Tensor]:
        """[first axis, second axis] of the stream: what another first entry along an axis of the arguments of some length changes."""
        for length in dict.fromkeys(plain.shape[:2]):
            seen = self._pass(partial(_changed, partial(_has_length, axis=axis, length=length), axis=axis))
            if seen is not None and seen.end is not None and seen.end.shape == plain.shape:
                yield (seen.end - plain).norm(dim=-1) > _SLIGHT * plain.norm(dim=-1)

    # ---- token ids

    def ids(self) -> Ids | None:
        """The token ids of the stream, by what another id changes of it; None where no embedding gets them, or several alike do."""
        found = [ids for number in range(len(self.plain.ids)) if (ids := self._at_start(number)) is not None]
        order = list(self._stack.embeddings)
        found.sort(key=lambda ids: (not ids.are_first, order.index(ids.embedding)))
        if not found or not found[0].are_first and (len(found) > 1 or not self._stack.alone):
            return None
        best = found[0]
        alike = [ids for ids in found if ids.are_first == best.are_first and self._size(ids) == self._size(best)]
        rivals = [ids for ids in alike if not torch.equal(ids.values, best.values)]
        return None if rivals and best.embedding != self._stack.embed else best

    def _size(self, ids: Ids) -> int:
        return getattr(self._stack.embeddings[ids.embedding], "num_embeddings", 0)

    def _at_start(self, number: int) -> Ids | None:
        """The ids of one call of an embedding, if another one at the first token of each row changes the stream there, as it begins."""
        start = self.plain.start
        path, values = self.plain.ids[number]
        assert start is not None and self.axes is not None
        seen = self._pass(other_ids=number) if tuple(values.shape) == self.shape else None
        if seen is None or seen.start is None or seen.start.permute(self.axes).shape != start.shape:
            return None
        places = (seen.start.permute(self.axes) - start).norm(dim=-1) > _SLIGHT * start.norm(dim=-1)  # [rows, tokens]
        return Ids(path, values, are_first=not places[:, 1:].any()) if places[:, 0].any() else None

    def named(self, ids: Ids) -> tuple[str, str] | None:
        """The innermost module around the stack that is given these ids, and the name of its argument."""
        for path in self._stack.around:
            names = [
                name
                for name, value in self.calls.get(path, {}).items()
                if isinstance(value, Tensor) and value.shape == ids.values.shape and torch.equal(value, ids.values)
            ]
            if len(names) > 1:  # two arguments may have been given equal values
                names = [name for name in names if self._is_at_start(self.calls[path][name])] or names
            if names:
                return path, names[0]
        return None

    def _is_at_start(self, value: Tensor) -> bool:
        """Whether another first token of an argument changes what comes into the first block."""
        name = self.outer_name(value)
        if name is None:
            return False
        seen = self._pass(lambda arguments: {**arguments, name: _with_other_first(arguments[name], 1)})
        assert self.axes is not None
        start = None if seen is None or seen.start is None else seen.start.permute(self.axes)
        return start is not None and not _alike(self.plain.start, start)

    def outer_name(self, value: Any) -> str | None:
        """What the module that is run calls this argument."""
        return next((name for name, given in self.outer.items() if value is not None and given is value), None)

    # ---- masks

    def masks(self, path: str, ids_name: str | None) -> tuple[str | None, tuple[str, ...]]:
        """Of the arguments of a module: the mask that hides tokens of the stream, and those that hide tokens of something else.

        Args:
            ids_name: what the module that is run calls the token ids.
        """
        own: str | None = None
        others: list[str] = []
        for name, value in self.calls.get(path, {}).items():
            outer = self.outer_name(value)
            per_token = mask_per_token(value)
            if not may_be_mask(name, value) or per_token is None or outer is None or bool((per_token != per_token[0, 0]).any()):
                continue
            shape = tuple(per_token.shape)
            of_stream = [key for key, given in self.outer.items() if _leads(key, given, shape) and ids_name in (None, key)]
            others_of_shape = [key for key, given in self.outer.items() if _leads(key, given, shape) and key not in (ids_name, None)]
            if own is None and shape == self.shape and self._hides(outer, of_stream, slice(1, None)):
                own = name
            elif any(self._hides(outer, [key], slice(None)) for key in others_of_shape):
                others.append(name)
        return own, tuple(others)

    def _hides(self, mask: str, names: list[str], tokens: slice) -> bool:
        """Whether the first token of some arguments changes these tokens of the stream, and no more when a mask leaves it out."""

        def hiding(arguments: dict[str, Any]) -> dict[str, Any]:
            hidden = arguments[mask].clone()
            hidden[..., 0] = not bool(hidden.flatten()[0])
            return {**arguments, mask: hidden}

        def other(arguments: dict[str, Any]) -> dict[str, Any]:
            return _changed(lambda name, value: name in names, arguments, axis=1)

        plain, seen = self.plain.end, self._other_end(other)
        hidden, hidden_other = self._other_end(hiding), self._other_end(lambda arguments: hiding(other(arguments)))
        if plain is None or seen is None or hidden is None or hidden_other is None:
            return False
        return not _alike(plain[:, tokens], seen[:, tokens]) and _alike(hidden[:, tokens], hidden_other[:, tokens])


# ---- other arguments


def _changed(wanted: Callable[[str, Tensor], bool], arguments: dict[str, Any], axis: int) -> dict[str, Any]:
    """Arguments with another first entry along an axis in each tensor that is wanted, also in what they hold."""
    return {name: _changed_in(wanted, name, value, axis) for name, value in arguments.items()}


def _changed_in(wanted: Callable[[str, Tensor], bool], name: str, value: Any, axis: int) -> Any:
    if isinstance(value, Tensor):
        return _with_other_first(value, axis) if wanted(name, value) else value
    if isinstance(value, dict):
        return {key: _changed_in(wanted, str(key), entry, axis) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_changed_in(wanted, name, entry, axis) for entry in value)
    return value


def _has_length(name: str, value: Tensor, axis: int, length: int) -> bool:
    """It may have an entry for each row or token of a stream; a mask that hides all would say nothing."""
    return value.dim() > axis and value.shape[axis] == length and not may_be_mask(name, value)


def _leads(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape[: len(shape)]) == shape and not may_be_mask(name, value)


def _with_other_first(value: Tensor, axis: int) -> Tensor:
    """The first entry along an axis replaced by the second, so that valid ids stay valid; by near values where these are the same."""
    value = value.clone()
    first = value.select(axis, 0)
    other = value.select(axis, 1) if value.shape[axis] > 1 else first.roll(1, 0)
    if torch.equal(other, first):
        other = ~first if first.dtype is torch.bool else 1 - first if value.is_floating_point() else torch.where(first > 0, first - 1, 1)
    first.copy_(other)
    return value


def may_be_mask(name: str, value: Any) -> bool:
    """By the name of an argument, or because it is a table of True and False."""
    return isinstance(value, Tensor) and (is_mask_name(name) or value.dtype is torch.bool and value.dim() > 1)


def mask_per_token(mask: Any) -> Tensor | None:
    """[rows, tokens], of a mask [rows, tokens] or [rows, 1, 1, tokens]; None of any other."""
    flat = isinstance(mask, Tensor) and mask.dim() > 1 and mask.numel() == mask.shape[0] * mask.shape[-1]
    return mask.flatten(1) if flat else None


def _alike(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool((a - b).norm() <= _SLIGHT * a.norm())
