"""JumpReLU in training (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import finite_number
from steer.features.activation import Activation
from steer.features.activations.jumprelu import JumpReLU
from steer.features.training.sparsifier import SPARSIFIERS, PenalisedSparsifier, Step


class _Jump(torch.autograd.Function):
    """pre where pre > threshold, else 0; the threshold's gradient is estimated from the pre-activations within a band around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        return gradients[0] * (pre > threshold), -gradients[0] * threshold * _band(pre, threshold, ctx.bandwidth), None


class _Count(torch.autograd.Function):
    """1 where pre > threshold, else 0; a gradient goes to the threshold alone, from within the same band."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        return None, -gradients[0] * _band(pre, threshold, ctx.bandwidth), None


def _band(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Density of a box of this width around the threshold."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


@SPARSIFIERS.register("jumprelu")
class JumpReLUSparsifier(PenalisedSparsifier):
    """A threshold for each feature, learned from a penalty on the number of features that are on (L0).

    Args:
        bandwidth: of the pre-activations around a threshold that it learns from; the activations have length sqrt(width) in training.
        threshold: of every feature at the beginning, in units of its activation.
    """

    def __init__(
        self, width: int, k: int, coefficient: float = 0.5, adjust: bool = True, bandwidth: float = 0.2, threshold: float = 0.1
    ) -> None:
        super().__init__(width, k, coefficient, adjust)
        finite_number(bandwidth, "`bandwidth` of the sparsifier 'jumprelu'", above=0)
        self.bandwidth = bandwidth
        self.threshold = nn.Parameter(torch.full((width,), float(threshold)))

    def active(self, pre: Tensor, step: Step) -> Tensor:
        # those right below the threshold are 0, and give it a gradient
        return (pre > (self.threshold.detach() - self.bandwidth / 2).clamp_min(0)).flatten().nonzero()[:, 0]

    def values(self, pre: Tensor, features: Tensor) -> Tensor:
        result: Tensor = _Jump.apply(pre, self.threshold[features], self.bandwidth)
        return result

    def penalty(self, values: Tensor, pre: Tensor, features: Tensor, step: Step) -> Tensor:
        count: Tensor = _Count.apply(pre, self.threshold[features], self.bandwidth)
        return step.warmth * self.coefficient * count.sum()

    def activation(self) -> Activation:
        return JumpReLU(self.threshold.detach().clamp_min(0).clone())
