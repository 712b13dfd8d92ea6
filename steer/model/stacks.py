"""Stacks of residual blocks, found by what goes in and out of modules in a trial pass, not by their names.

A stack is a list of modules of which each takes what the one before gave, in the same shape: the residual stream. What is found holds
paths and no modules, and is kept for each model as long as it has the same modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from steer.model.own_call_trials import StackCalls
from steer.model.own_calls import OwnCall, find_own_call
from steer.model.trial_pass import (
    ROWS,
    TOKENS,
    Argument,
    Run,
    arguments_of,
    example_lead,
    first_tensor,
    integers_of,
    is_transformers_model,
    token_parameters,
    trial_passes,
)

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Stack:
    """A stack of residual blocks, in paths of the module that was run.

    Attributes:
        path: of the list that holds the blocks.
        names: of the blocks in it, in order.
        argument: place or name of the stream among the arguments of a block.
        shape: of the stream in the trial pass.
        final_norm, embedding, unembedding: as far as the pass showed them.
        end: tells which of several stacks ended last.
        takes_ids: the module that is called with its tokens takes token ids, so that the stream has one entry for each of these.
        own_call: how the module around it is called when that is none of transformers.
        lead: numbers of rows and tokens in the trial pass.
    """

    path: str
    names: tuple[str, ...]
    argument: Argument
    shape: tuple[int, ...]
    final_norm: str | None
    embedding: str | None
    unembedding: str | None
    end: int
    takes_ids: bool = True
    own_call: OwnCall | None = None
    lead: tuple[int, int] = (ROWS, TOKENS)

    @property
    def block_paths(self) -> list[str]:
        return [f"{self.path}.{name}" if self.path else name for name in self.names]

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Order of the axes of the stream that begins with batch and tokens; None when the pass did not show where these are."""
        if self.own_call is not None:
            return self.own_call.axes
        n_rows, n_tokens = self.lead
        if not self.takes_ids and len(self.shape) == 3 and self.shape[0] == n_rows:
            return (0, 1, 2)  # tokens of an image or of audio
        if self.shape.count(n_rows) != 1 or self.shape.count(n_tokens) != 1:
            return (0, 1, *range(2, len(self.shape))) if self.shape[:2] == (n_rows, n_tokens) else None
        rows, tokens = self.shape.index(n_rows), self.shape.index(n_tokens)
        return (rows, tokens, *(axis for axis in range(len(self.shape)) if axis not in (rows, tokens)))


def is_text(path: str) -> bool:
    """The name of a stack says that text goes through it."""
    return any(mark in path for mark in ("language_model", "text_model", "decoder"))


def main_stack(stacks: Sequence[Stack]) -> Stack:
    """Of those that ran in one pass: the text's beside an image's; the one that tokens go into, not a head behind it; then the one that
    ended last, which is the decoder's."""
    of_text = [stack for stack in stacks if is_text(stack.path)]
    with_ids = [stack for stack in stacks if stack.own_call is not None and stack.own_call.starts_with_ids]
    return max(of_text or with_ids or stacks, key=lambda stack: stack.end)


@dataclass(frozen=True)
class Survey:
    """What a trial pass showed of a model: its stacks, and the calls that failed or showed none."""

    stacks: tuple[Stack, ...]
    failures: tuple[str, ...]


@dataclass(eq=False)
class Call:
    """The first call of a module in a trial pass.

    Attributes:
        inputs: copies of the floating-point tensors it was called with.
        ids: copy of its first argument when that was integers; None when it was not.
        is_leaf: the module holds no others.
        is_norm: it has no weights, or vectors alone.
        output: copy of what it gave.
        end: how many calls ended before this one did; None while it runs.
    """

    inputs: dict[Argument, Tensor]
    ids: Tensor | None
    is_leaf: bool
    is_norm: bool
    output: Tensor | None = None
    end: int | None = None


# by model that was run, with the state of its modules that it holds for
_SURVEYS: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Survey]] = weakref.WeakKeyDictionary()


def structure_of(model: nn.Module) -> Hashable:
    """Changes when a model gets other modules."""
    return tuple((path, id(module)) for path, module in model.named_modules())


def survey(model: nn.Module, obstacle: str | None = None, layers: str | None = None, embed: str | None = None) -> Survey:
    """The stacks of a model; it runs once for that as long as its modules stay.

    Args:
        obstacle: why it must not run now.
        layers: path of a module that is said to hold blocks, whatever its class.
        embed: path of a module that is said to embed the tokens.
    """
    structure = (structure_of(model), layers, embed)
    known = _SURVEYS.get(model)
    if known is not None and known[0] == structure:
        return known[1]
    if obstacle is not None:
        return Survey((), (f"no pass: {obstacle}",))
    _SURVEYS[model] = (structure, found := _survey(model, layers, embed))
    return found


def forget_survey(model: nn.Module) -> None:
    """Lets a model run again when its stacks are asked for."""
    for module in model.modules():
        _SURVEYS.pop(module, None)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal in shape and in every value, NaN too: a model of broken weights has blocks like any other. On meta there are no values."""
    if a is None or b is None or a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta:
        return True
    b = b.to(a.device)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _survey(model: nn.Module, layers: str | None, embed: str | None) -> Survey:
    failures: list[str] = []
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, LISTS) or path == layers]
    members = {member for _, holder in lists for member in holder.children()}
    inside = {inner for member in members for inner in member.modules()} - members
    watched = {path: module for path, module in model.named_modules() if module not in inside}
    broken: Survey | None = None  # by this way of calling it, at least
    for description, run in trial_passes(model) if lists else ():
        calls = _Calls()
        try:
            run(list(watched.values()), calls.enter, calls.leave)
        except Exception as error:  # whatever an unknown model raises when it is called in an unknown way
            failures.append(f"{description}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found = [stack for path, holder in lists if (stack := _stack(path, holder, calls.ended, watched)) is not None]
        stacks = [stack for stack in found if not any(_lies_in_block(stack.path, other) for other in found)]
        if not stacks:
            failures.append(f"{description}: no list of modules that pass one tensor on")
        elif is_transformers_model(model):
            lead = example_lead(model) or (ROWS, TOKENS)
            return Survey(tuple(replace(stack, takes_ids=_takes_ids(model, stack), lead=lead) for stack in stacks), tuple(failures))
        else:
            seen = Survey(_with_own_calls(model, stacks, run, calls.ended, embed), tuple(failures))
            if all(_is_finite(model, stack, calls.ended) for stack in stacks):
                return seen
            broken = broken or seen
    return broken or Survey((), tuple(failures))


def _takes_ids(model: nn.Module, stack: Stack) -> bool:
    """Of the innermost module around it that is called with token ids or embeddings."""
    names = stack.path.split(".") if stack.path else []
    around = [token_parameters(model.get_submodule(".".join(names[:depth]))) for depth in range(len(names), -1, -1)]
    return "input_ids" in next((parameters for parameters in around if parameters), ())


def _is_finite(model: nn.Module, stack: Stack, calls: dict[nn.Module, Call]) -> bool:
    call = calls.get(model.get_submodule(stack.block_paths[-1]))
    return call is None or call.output is None or call.output.is_meta or bool(call.output.isfinite().all())


def _with_own_calls(model: nn.Module, stacks: list[Stack], run: Run, calls: dict[nn.Module, Call], embed: str | None) -> tuple[Stack, ...]:
    """Each stack with the call of a module around it. No two have the same one, or the tokens of the one would be taken for the other's."""
    found = {}
    for stack in stacks:
        call = find_own_call(run, _calls_of(model, stack, calls, embed, set(), alone=len(stacks) == 1))
        found[stack.path] = replace(stack, own_call=call, embedding=call.embedding)
    main = main_stack(list(found.values()))
    taken = {_root(main)}
    for stack in sorted(found.values(), key=lambda stack: stack.end):
        if stack is main or _root(stack) not in taken:
            taken.add(_root(stack))
            continue
        call = find_own_call(run, _calls_of(model, stack, calls, embed, taken, alone=False))
        if call.root in taken:
            whole = call.root or "the model itself"
            call = replace(call, axes=None, problem=f"another stack lies in the same module ({whole}), whose calls tell the tokens of that")
        found[stack.path] = replace(stack, own_call=call, embedding=call.embedding)
        taken.add(call.root)
    return tuple(found.values())


def _root(stack: Stack) -> str:
    assert stack.own_call is not None
    return stack.own_call.root


def _calls_of(
    model: nn.Module, stack: Stack, calls: dict[nn.Module, Call], embed: str | None, taken: set[str], *, alone: bool
) -> StackCalls:
    """What is called around a stack, and at its ends. taken: paths of modules that are called for other stacks."""
    names = stack.path.split(".") if stack.path else []
    around = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    callable_around = [path for path in around if not isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict))]
    beyond = [path for path in callable_around if path != stack.path] or callable_around
    free = [path for path in beyond if path not in taken] or beyond
    ran = sorted(
        (module for path in stack.block_paths if (module := model.get_submodule(path)) in calls), key=lambda module: calls[module].end or 0
    )
    embeddings = {
        path: module
        for path, module in model.named_modules()
        if module in calls and calls[module].is_leaf and calls[module].ids is not None
    }
    largest = sorted(embeddings, key=lambda path: (path == embed, getattr(embeddings[path], "num_embeddings", 0)), reverse=True)
    return StackCalls(
        whole=model,
        around={path: model.get_submodule(path) for path in free},
        first=ran[0],
        last=ran[-1],
        argument=stack.argument,
        embeddings={path: embeddings[path] for path in largest},
        embed=embed,
        alone=alone,
    )


class _Calls:
    """Records the first call of each module."""

    def __init__(self) -> None:
        self.ended: dict[nn.Module, Call] = {}
        self._begun: dict[nn.Module, Call] = {}

    def enter(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if module not in self._begun:
            inputs = {place: tensor.detach().clone() for place, tensor in arguments_of(args, kwargs).items()}
            is_norm = all(parameter.dim() <= 1 for parameter in module.parameters())
            self._begun[module] = Call(inputs, integers_of(args, kwargs), not any(module.children()), is_norm)

    def leave(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        call = self._begun[module]
        if call.end is None:
            tensor = first_tensor(output)
            call.end = len(self.ended)
            call.output = None if tensor is None else tensor.detach().clone()  # it may be written to later
            self.ended[module] = call


def _lies_in_block(path: str, stack: Stack) -> bool:
    return any(path == block or path.startswith(block + ".") for block in stack.block_paths)


def _stack(path: str, holder: nn.Module, calls: dict[nn.Module, Call], watched: dict[str, nn.Module]) -> Stack | None:
    """The stack that a list of modules is; None when it is none. Members that did not run are taken for blocks like the others."""
    members = dict(holder.named_children())
    in_order, argument = _chain([calls[member] for member in members.values() if member in calls])
    if argument is None:
        return None
    chosen = set(map(id, in_order))
    members = {name: member for name, member in members.items() if member not in calls or id(calls[member]) in chosen}
    blocks = set(members.values())
    outside = {path: calls[module] for path, module in watched.items() if module in calls and module not in blocks}
    last, shape = in_order[-1], in_order[-1].output.shape  # type: ignore[union-attr]
    after = {path: call for path, call in outside.items() if call.end is not None and last.end is not None and call.end > last.end}
    final_norm = next((path for path, call in after.items() if call.is_norm and _changes(call, last.output)), None)
    end_of_stream = after[final_norm].output if final_norm is not None else last.output
    unembedding = next((path for path, call in after.items() if call.is_leaf and _is_head(call, end_of_stream)), None)
    embedding = next((path for path, call in outside.items() if call.is_leaf and call.ids is not None and _is_of_tokens(call)), None)
    return Stack(path, tuple(members), argument, tuple(shape), final_norm, embedding, unembedding, last.end or 0)


def _chain(ran: list[Call]) -> tuple[list[Call], Argument | None]:
    """The blocks among the members of a list that ran, in order, and the argument by which each takes the stream; None where there is none.

    An embedding, a norm or a head may stand at the ends of the list, and a dropout between the blocks.
    """
    in_order = sorted((call for call in ran if not call.is_leaf), key=lambda call: call.end or 0)
    for left_out, start in sorted((start + stop, start) for start in range(3) for stop in range(3)):
        chain = in_order[start : len(in_order) - (left_out - start)]
        if chain and (len(chain) > 1 or len(chain) == len(ran)) and (argument := _argument_of_stream(chain)) is not None:
            return chain, argument
    return [], None


def _argument_of_stream(calls: list[Call]) -> Argument | None:
    """The argument by which each block takes what the one before gave, in the shape in which it gives its own."""
    fitting = {place for place, tensor in calls[-1].inputs.items()}
    for before, after in zip(calls, calls[1:], strict=False):
        fitting &= {place for place, tensor in after.inputs.items() if same(tensor, before.output)}
    shapes = {call.output.shape if call.output is not None else None for call in calls}
    fitting = {p for p in fitting if all(p in call.inputs for call in calls) and {c.inputs[p].shape for c in calls} == shapes}
    if len(calls) == 1:  # nothing passes it on: what a single block changes at all
        fitting = {place for place in fitting if not same(calls[0].inputs[place], calls[0].output)}
    return min(fitting, key=str) if fitting else None


def _is_of_tokens(call: Call) -> bool:
    return call.output is not None and call.output.shape[:2] == (ROWS, TOKENS)


def _changes(call: Call, stream: Tensor | None) -> bool:
    """It takes the stream and gives another tensor of that shape."""
    if not call.inputs or not same(next(iter(call.inputs.values())), stream):
        return False
    return stream is not None and call.output is not None and call.output.shape == stream.shape and not same(call.output, stream)


def _is_head(call: Call, end_of_stream: Tensor | None) -> bool:
    """It takes the end of the stream and gives something of another width for every token."""
    if not call.inputs or call.output is None or not same(given := next(iter(call.inputs.values())), end_of_stream):
        return False
    return call.output.shape[:-1] == given.shape[:-1] and call.output.shape != given.shape
