"""A function of one's own as a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import ConfigError, ContextError
from steer.intervene.gate import GATES, Leaf
from steer.intervene.scope import Scope
from steer.model.context import ForwardContext


@GATES.register("call")
class CallGate(Leaf):
    """Opens where a function of the activation is above 0. It cannot be saved with a plan.

    Args:
        function: takes h [batch, tokens, width] and the forward context, returns [batch, tokens]; booleans count as 1 and -1.
        width: of the activation it reads.
        options: site, per, over, pool, sharpness, see `Leaf`.
    """

    def __init__(self, function: Callable[[Tensor, ForwardContext], Tensor], width: int, **options: Any) -> None:
        if not callable(function):
            raise ConfigError(
                "gate 'call' has no function",
                expected="a function of the activation and the forward context",
                found=repr(function),
                remedy="e.g. CallGate(lambda h, ctx: h[..., 0], width)",
            )
        super().__init__({}, width, **options)
        self.function = function

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        said = self.function(h, ctx)
        if not isinstance(said, Tensor) or said.shape != h.shape[:-1]:
            raise ContextError(
                "the function of gate 'call' does not decide for each token",
                expected=f"a tensor of shape {list(h.shape[:-1])}",
                found=list(said.shape) if isinstance(said, Tensor) else type(said).__name__,
                remedy="return one number per token; the gate's `per` and `pool` make rows of them",
            )
        return said.float() * 2 - 1 if said.dtype is torch.bool else said.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A plan copies its gates; the function, which may be the method of a model, stays the one that was given."""
        made = memo[id(self)] = self.copy(memo)
        made.over = Scope.parse(str(self.over))
        return made

    def to_dict(self) -> dict[str, Any]:
        raise ConfigError(
            "a gate made of a Python function cannot be saved",
            expected="a gate of tensors: probe, cosine or feature",
            found=getattr(self.function, "__name__", repr(self.function)),
            remedy="express it as one of those, or add the gate again after loading the plan",
        )
