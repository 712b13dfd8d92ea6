"""Sparse encoding and decoding with gradients: products over the features that are on, never over all of them.

A step of training has two dense products forward (encoder, decoder) and three or four backward. Of n features k are on at a token; with the
pattern of what is on as a sparse matrix [tokens, n], all but the encoder's forward product cost k / n of that. On a CPU, with 2,048
tokens, 4,096 features of width 576 and 32 on, the decoder takes 9 ms in place of 98, its gradient 15, that of the features 13. The products
are those of `steer.kernels.sparse_decode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.kernels.sparse_decode import decode_pattern, transposed_times
from steer.kernels.sparse_pattern import SPARSE, SparsePattern


class ActiveFeatures(SparsePattern):
    """Which features are on at which tokens.

    Attributes:
        index: [n_active] places in the flattened matrix, growing.
    """

    def __init__(self, index: Tensor, tokens: int, features: int) -> None:
        self.index = index
        token = index.div(features, rounding_mode="floor")
        super().__init__(token, index - token * features, tokens, features)

    @property
    def is_sparse(self) -> bool:
        """Sparse products are faster than dense ones."""
        return len(self.index) * SPARSE < self.shape[0] * self.shape[1]

    def part(self, chosen: Tensor) -> ActiveFeatures:
        """Those of the active features that a mask [n_active] keeps."""
        return ActiveFeatures(self.index[chosen], *self.shape)

    def dense(self, values: Tensor) -> Tensor:
        """[tokens, features] with 0 where a feature is off."""
        return values.new_zeros(self.shape[0] * self.shape[1]).index_put((self.index,), values).view(self.shape)


class _Encode(torch.autograd.Function):
    """Pre-activations of the active features, which were computed with all others, with the gradient of these alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, active: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.active = active
        return pre.flatten()[active.index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        active, gradient = ctx.active, gradients[0].contiguous()
        of_weight = transposed_times(active, gradient, x)  # [features, d]
        of_bias = transposed_times(active, gradient, x.new_ones(len(x), 1))[:, 0] if any(ctx.needs_input_grad[3:5]) else None
        of_shift = -(of_bias @ weight) if ctx.needs_input_grad[4] and of_bias is not None else None
        return None, None, of_weight, of_bias if ctx.needs_input_grad[3] else None, of_shift, None


def encode_active(pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, active: ActiveFeatures) -> Tensor:
    """[n_active] pre-activations x @ weight.T + bias of the active features, differentiable in weight, bias and shift.

    Args:
        pre: [tokens, features] all of them, without gradient.
        x: [tokens, d] what is encoded, shift taken off.
    """
    if active.is_sparse:
        with torch.autocast(pre.device.type, enabled=False):
            result: Tensor = _Encode.apply(pre, x, weight, bias, shift, active)
        return result
    whole = x if shift is None else x + shift.detach() - shift  # the number x, with the gradient of the shift
    return torch.nn.functional.linear(whole, weight, bias).float().flatten()[active.index]


def decode_active(values: Tensor, weight: Tensor, active: ActiveFeatures) -> Tensor:
    """[tokens, d] values @ weight, differentiable in both."""
    return decode_pattern(values, weight, active) if active.is_sparse else (active.dense(values) @ weight).float()
