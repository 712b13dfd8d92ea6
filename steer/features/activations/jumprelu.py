"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation


@ACTIVATIONS.register("jumprelu")
class JumpReLU(Activation):
    """pre where it exceeds the feature's own threshold, else 0: Gemma Scope, Llama Scope, BatchTopK as SAELens saves it.

    Args:
        threshold: [features].
        rectified: negative pre-activations are 0 even above a threshold below 0. circuit-tracer alone lets them through.
    """

    def __init__(self, threshold: Tensor, rectified: bool = True) -> None:
        super().__init__({"threshold": threshold}, rectified=rectified)

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        is_on = pre > self.of("threshold", pre, features)
        return (pre.relu() if self.settings["rectified"] else pre) * is_on

    def slope(self, pre: Tensor, f: Tensor) -> Tensor:
        return f > 0 if self.settings["rectified"] else pre > self.of("threshold", pre, None)

    def threshold(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        threshold = self.of("threshold", pre, features).expand(pre.shape[-1])
        return threshold.clamp_min(0) if self.settings["rectified"] else threshold
