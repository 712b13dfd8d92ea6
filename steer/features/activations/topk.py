"""TopK (Makhzani & Frey 2013, arXiv 1312.5663; Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("topk")
class TopK(Activation):
    """The k largest pre-activations of each token, and 0 elsewhere: sparsify, OpenAI, Qwen-Scope.

    Args:
        rectified: of these, negative ones are 0 too.
    """

    elementwise = False

    def __init__(self, k: int, rectified: bool = True) -> None:
        super().__init__(k=k, rectified=rectified)

    @property
    def top(self) -> int:
        k: int = self.settings["k"]
        return k

    def of_top(self, pre: Tensor) -> Tensor:
        return pre.relu() if self.settings["rectified"] else pre

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        values, indices = pre.topk(min(self.top, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, self.of_top(values))
