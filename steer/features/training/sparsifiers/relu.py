"""ReLU with an L1 penalty in training (Bricken et al. 2023, Towards Monosemanticity)."""

from __future__ import annotations

from torch import Tensor

from steer.features.activation import Activation
from steer.features.activations.relu import ReLU
from steer.features.training.sparsifier import SPARSIFIERS, PenalisedSparsifier, Step


@SPARSIFIERS.register("relu")
class L1Sparsifier(PenalisedSparsifier):
    """Whatever is above 0, with a penalty on the sum of the features (L1), which shrinks them."""

    def __init__(self, width: int, k: int, coefficient: float = 0.5, adjust: bool = True) -> None:
        super().__init__(width, k, coefficient, adjust)

    def active(self, pre: Tensor, step: Step) -> Tensor:
        return (pre > 0).flatten().nonzero()[:, 0]

    def penalty(self, values: Tensor, pre: Tensor, features: Tensor, step: Step) -> Tensor:
        return step.warmth * self.coefficient * values.sum()

    def activation(self) -> Activation:
        return ReLU()
