"""Cosine with a condition vector as a gate (CAST, arXiv 2409.05907, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.gate import GATES, Leaf, one_number
from steer.intervene.low_rank import widened
from steer.intervene.operator import slotted
from steer.model.context import ForwardContext


@GATES.register("cosine")
class CosineGate(Leaf):
    """Opens where cos(h, c) exceeds a threshold; `~CosineGate(...)` where it does not.

    CAST compares h with its projection onto c, whose cosine is |cos(h, c)|: `CosineGate(c, t) | CosineGate(-c, t)`.

    Args:
        vector: [width] c.
        threshold: from -1 to 1.
        options: site, per, over, pool, sharpness, see `Leaf`.

    Raises:
        ConfigError: a zero vector, which has no direction.
    """

    name = "cosine"
    learnable = ("vector", "threshold")

    def __init__(self, vector: Tensor, threshold: float | Tensor = 0.0, **options: Any) -> None:
        vector = slotted(vector, 2, "condition vector")
        if not vector.any():
            raise ConfigError(
                "condition vector is zero",
                expected="a vector with a direction",
                found="zeros",
                remedy="take the vector of a site at which the conditions differ",
            )
        super().__init__({"vector": vector, "threshold": one_number(threshold, "threshold of a cosine")}, vector.shape[-1], **options)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        return torch.nn.functional.cosine_similarity(widened(h), self.tensors["vector"], dim=-1) - self.tensors["threshold"]
