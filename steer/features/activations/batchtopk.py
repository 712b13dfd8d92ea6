"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from steer.features.activation import ACTIVATIONS, Activation
from steer.features.activations.jumprelu import JumpReLU


@ACTIVATIONS.register("batchtopk")
class BatchTopK(JumpReLU):
    """pre where it exceeds one threshold that all features share: BatchTopK and Matryoshka, as they are used after training.

    Args:
        threshold: the mean, over training, of the smallest activation that was kept.
        k: features per token that were kept in training; None where the file does not say.
    """

    def __init__(self, threshold: float | Tensor, k: int | None = None) -> None:
        Activation.__init__(self, {"threshold": torch.as_tensor(threshold, dtype=torch.float32).reshape(1)}, k=k, rectified=True)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["threshold"], settings["k"])
