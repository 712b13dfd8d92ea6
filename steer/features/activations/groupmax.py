"""GroupMax: one feature of each group, which sparsify offers beside TopK."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("groupmax")
class GroupMax(Activation):
    """Of k groups of neighbouring features, the largest pre-activation of each, where it is above 0."""

    elementwise = False

    def __init__(self, k: int) -> None:
        super().__init__(k=k)

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        groups = pre.relu().unflatten(-1, (self.settings["k"], -1))  # [..., k, features of a group]
        values, indices = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, indices, values).flatten(-2)
