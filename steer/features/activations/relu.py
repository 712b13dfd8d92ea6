"""ReLU features, kept sparse by an L1 penalty (Bricken et al. 2023, Towards Monosemanticity)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("relu")
class ReLU(Activation):
    """max(pre, 0): standard dictionaries, trained with an L1 penalty."""

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        return pre.relu()

    def slope(self, pre: Tensor, f: Tensor) -> Tensor:
        return f > 0

    def threshold(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        return torch.zeros(pre.shape[-1], dtype=pre.dtype, device=pre.device)
