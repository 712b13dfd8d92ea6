"""A function of one's own as a gate. Ours, after CAST (Lee et al. 2024, arXiv 2409.05907), which decides by a cosine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import ConfigError, ContextError
from steer.intervene.gate import GATES, SiteGate
from steer.model.context import ForwardContext


@GATES.register("call")
class CallGate(SiteGate):
    """Opens where a function of the activation is above 0. It cannot be saved with a plan.

    Args:
        function: takes h [batch, tokens, width] and the forward context, returns [batch, tokens]; booleans count as 1 and -1.
        width: of the activation it reads.
        options: site, per, over, pool, sharpness, see `SiteGate`.

    Raises:
        ConfigError: no function; a plan with it that is saved. ContextError, in a pass: no decision for each token.

    Example:
        >>> gate = steer.CallGate(lambda h, ctx: h.norm(dim=-1) - 6.0, width=vector.shape[0])  # [batch, tokens]
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", gate=gate))
    """

    is_tried = False  # its function may go by what only a real pass has; what it gives is looked at in each

    def __init__(self, function: Callable[[Tensor, ForwardContext], Tensor], width: int, **options: Any) -> None:
        if not callable(function):
            raise _no_function(function)
        super().__init__({}, width, **options)
        self.function = function

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        decided = self.function(h, ctx)  # [batch, tokens]
        if not isinstance(decided, Tensor) or decided.shape != h.shape[:-1]:
            raise _no_decision_per_token(decided, h)
        return decided.float() * 2 - 1 if decided.dtype is torch.bool else decided.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The function, which may be the method of a model, stays the one that was given."""
        copied = memo[id(self)] = copy.copy(self)
        return copied

    def to_dict(self) -> dict[str, Any]:
        raise _not_saved(self.function)


# ---- errors


def _no_function(function: Any) -> ConfigError:
    return ConfigError(
        "gate 'call' has no function",
        expected="a function of the activation and the forward context",
        found=repr(function),
        remedy="e.g. CallGate(lambda h, ctx: h[..., 0], width)",
    )


def _no_decision_per_token(decided: Any, h: Tensor) -> ContextError:
    return ContextError(
        "the function of gate 'call' does not decide for each token",
        expected=f"a tensor of shape {list(h.shape[:-1])}",
        found=list(decided.shape) if isinstance(decided, Tensor) else type(decided).__name__,
        remedy="return one number per token; the gate's `per` and `pool` make rows of them",
    )


def _not_saved(function: Any) -> ConfigError:
    return ConfigError(
        "a gate made of a Python function cannot be saved",
        expected="a gate of tensors: probe, cosine or feature",
        found=getattr(function, "__name__", repr(function)),
        remedy="express it as one of those, or add the gate again after loading the plan",
    )
