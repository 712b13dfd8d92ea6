"""Whether a part of a block mixes tokens: it is called again with another first token, and what it gives for the others is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.restoring import restoring_all
from steer.model.stacks import Stack, same
from steer.model.trial_pass import Argument, first_tensor

# share of an activation that another first token must change in the others for its module to mix tokens
_MIXING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


@dataclass(eq=False)
class BlockCall:
    """One call of a module in a block.

    Attributes:
        inputs, output: copies.
        args, kwargs: as given, to call it again.
        rows: [batch * tokens, width] its output, where that could be added to the stream.
        again: it was called more than once in the block.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[Argument, Tensor]
    output: Tensor | None = None
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    again: bool = False


def mixes(part: BlockCall, stack: Stack) -> bool | None:
    """Whether another first token changes what a module gives for the others; None when it cannot be called again."""
    given = next(((place, tensor) for place, tensor in part.inputs.items() if tensor.numel() == _numel(stack)), None)
    if given is None or part.output is None:
        return None
    place, tensor = given
    args, kwargs = _with_other_first_token(part, tensor, stack)
    try:
        output = first_tensor(part.module(*args, **kwargs))
    except Exception:  # it keeps state, or was not meant to be called twice
        return None
    if output is None or output.numel() != _numel(stack):
        return None
    return _differ_elsewhere(part.output, output, stack)


def is_bare(part: BlockCall) -> bool:
    """The last map of what a block computes itself, in no module of its own."""
    return not any(part.module.children())


def mixes_in_block(block: BlockCall, chosen: Sequence[BlockCall], number: int, stack: Stack) -> bool | None:
    """Whether another first token of a block changes what one of its writers gives for the others, while those before it give what they
    gave. None when it cannot be called again."""
    writer = chosen[number]
    seen: list[Tensor | None] = []

    def again(call: BlockCall, output: Any) -> Any:
        return (call.output, *output[1:]) if isinstance(output, tuple) else call.output

    args, kwargs = _with_other_first_token(block, block.inputs[stack.argument], stack)
    with restoring_all() as hooks:
        for earlier in chosen[:number]:
            hook = earlier.module.register_forward_hook(lambda _, __, output, call=earlier: again(call, output))
            hooks.callback(hook.remove)
        hooks.callback(writer.module.register_forward_hook(lambda _, __, output: seen.append(first_tensor(output))).remove)
        try:
            block.module(*args, **kwargs)
        except Exception:  # it keeps state, or was not meant to be called twice
            return None
    return None if not seen or seen[0] is None or writer.output is None else _differ_elsewhere(writer.output, seen[0], stack)


def _differ_elsewhere(plain: Tensor, other: Tensor, stack: Stack) -> bool:
    """Two tensors differ at other tokens than the first."""
    a, b = _by_token(plain, stack)[:, 1:].double(), _by_token(other, stack)[:, 1:].double()
    return bool((a - b).norm() > _MIXING.get(plain.dtype, 1e-5) * a.norm())


def _with_other_first_token(call: BlockCall, tensor: Tensor, stack: Stack) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with another first token wherever this tensor is given, as query, key and value may be."""
    changed = _by_token(tensor, stack).clone()
    changed[:, 0] = changed[:, 0].roll(1, -1).neg() + changed[:, 0].std()
    other = _back(changed, tensor, stack)
    args: list[Any] = [other if same(call.inputs.get(place), tensor) else value for place, value in enumerate(call.args)]
    return args, {name: other if same(call.inputs.get(name), tensor) else value for name, value in call.kwargs.items()}


def _numel(stack: Stack) -> int:
    return stack.shape[0] * stack.shape[1] * stack.shape[2]


def _by_token(tensor: Tensor, stack: Stack) -> Tensor:
    """[batch, tokens, width]"""
    assert stack.axes is not None
    return tensor.reshape(stack.shape).permute(stack.axes)


def _back(tensor: Tensor, like: Tensor, stack: Stack) -> Tensor:
    """In the shape that a module takes, from [batch, tokens, width]."""
    assert stack.axes is not None
    order = [stack.axes.index(axis) for axis in range(3)]
    return tensor.permute(order).reshape(like.shape)
