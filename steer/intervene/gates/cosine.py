"""Cosine with a condition vector as a gate (CAST, arXiv 2409.05907, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.gate import GATES, SiteGate, one_number
from steer.intervene.low_rank import widened
from steer.intervene.operator import slotted
from steer.model.context import ForwardContext


@GATES.register("cosine")
class CosineGate(SiteGate):
    """Opens where cos(h, c) exceeds a threshold; `~CosineGate(...)` where it does not.

    Not CAST's own number, so its thresholds do not carry over: CAST takes the mean activation of the prompt, or that of its last token, and
    the cosine between it and the tanh of its projection onto c. Here each token has its cosine, and `pool` makes one of them. What is alike
    is that a projection does not tell h from -h, for which there is `CosineGate(c, t) | CosineGate(-c, t)`.

    Args:
        vector: [width] c.
        threshold: one number from -1 to 1; with a sharpness, any number.
        options: site, per, over, pool, sharpness, see `SiteGate`.

    Raises:
        ConfigError: a zero vector, which has no direction; a threshold that no cosine reaches.

    Example:
        >>> gate = steer.CosineGate(vector, 0.2, per="row", over="prompt")
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", gate=gate))
    """

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
        if not self.is_soft and self.tensors["threshold"].abs() > 1:  # a soft one may be learned beyond, and still opens a little
            raise ConfigError(
                "threshold of a cosine is out of reach",
                expected="a number from -1 to 1",
                found=float(self.tensors["threshold"]),
                remedy="cosines of real activations are small: try 0.1, or use ProbeGate for a projection",
            )

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        return torch.nn.functional.cosine_similarity(widened(h), self.tensors["vector"], dim=-1) - self.tensors["threshold"]
