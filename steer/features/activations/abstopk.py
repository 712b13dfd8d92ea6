"""AbsTopK: features with a sign (Zhu, Khalili & Zhu 2025, arXiv 2510.00404), as SAELens trains them."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("abstopk")
class AbsTopK(Activation):
    """The k pre-activations of each token that are farthest from 0, with their signs."""

    elementwise = False

    def __init__(self, k: int) -> None:
        super().__init__(k=k)

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        indices = pre.abs().topk(min(self.settings["k"], pre.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices))
