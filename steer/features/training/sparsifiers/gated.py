"""Gated dictionaries in training (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steer.features.activation import Activation
from steer.features.activations.gated import Gated
from steer.features.training.sparsifier import SPARSIFIERS, PenalisedSparsifier, Step


@SPARSIFIERS.register("gated")
class GatedSparsifier(PenalisedSparsifier):
    """A gate that is penalised (L1) and has to reconstruct on its own, and a magnitude that is not shrunk."""

    has_bias = False

    def __init__(self, width: int, k: int, coefficient: float = 0.5, adjust: bool = True) -> None:
        super().__init__(width, k, coefficient, adjust)
        self.gate_bias, self.magnitude_bias, self.log_scale = (nn.Parameter(torch.zeros(width)) for _ in range(3))

    def active(self, pre: Tensor, step: Step) -> Tensor:
        return (pre + self.gate_bias.detach() > 0).flatten().nonzero()[:, 0]

    def values(self, pre: Tensor, features: Tensor) -> Tensor:
        return (self.log_scale[features].exp() * pre + self.magnitude_bias[features]).relu()

    def gate_values(self, pre: Tensor, features: Tensor) -> Tensor:
        return (pre + self.gate_bias[features]).relu()

    def penalty(self, values: Tensor, pre: Tensor, features: Tensor, step: Step) -> Tensor:
        return step.warmth * self.coefficient * self.gate_values(pre, features).sum()

    def activation(self) -> Activation:
        return Gated(*(tensor.detach().clone() for tensor in (self.gate_bias, self.magnitude_bias, self.log_scale)))
