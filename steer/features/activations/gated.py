"""Gated dictionaries (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("gated")
class Gated(Activation):
    """max(exp(r) pre + magnitude bias, 0) where pre + gate bias > 0: whether a feature is on, and how strongly, are told apart.

    Args:
        gate_bias, magnitude_bias, log_scale: [features]. The encoder itself has no bias.
    """

    def __init__(self, gate_bias: Tensor, magnitude_bias: Tensor, log_scale: Tensor) -> None:
        super().__init__({"gate_bias": gate_bias, "magnitude_bias": magnitude_bias, "log_scale": log_scale})

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        is_on = pre + self.of("gate_bias", pre, features) > 0
        magnitude = self.of("log_scale", pre, features).exp() * pre + self.of("magnitude_bias", pre, features)
        return magnitude.relu() * is_on

    def slope(self, pre: Tensor, f: Tensor) -> Tensor:
        return self.of("log_scale", pre, None).exp() * (f > 0)

    def threshold(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        """Both the gate and the magnitude have to be above 0."""
        of_gate = -self.of("gate_bias", pre, features)
        of_magnitude = -self.of("magnitude_bias", pre, features) / self.of("log_scale", pre, features).exp()
        return of_gate.maximum(of_magnitude)
