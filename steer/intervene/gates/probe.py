"""Linear probe as a gate. Ours, after CAST (Lee et al. 2024, arXiv 2409.05907), which decides by a cosine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.gate import GATES, SiteGate, one_number
from steer.intervene.low_rank import widened
from steer.intervene.operator import slotted
from steer.model.context import ForwardContext


@GATES.register("probe")
class ProbeGate(SiteGate):
    """Opens where h·w + b > 0, e.g. a logistic regression's weights.

    Args:
        vector: [width] w.
        bias: b, one number in the units of h·w; minus the threshold.
        options: site, per, over, pool, sharpness, see `SiteGate`.

    Example:
        >>> gate = steer.ProbeGate(vector, bias=-0.5)
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", gate=gate))
    """

    learnable = ("vector", "bias")

    def __init__(self, vector: Tensor, bias: float | Tensor = 0.0, **options: Any) -> None:
        vector = slotted(vector, 2, "probe")
        super().__init__({"vector": vector, "bias": one_number(bias, "bias of a probe")}, vector.shape[-1], **options)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        return (widened(h) * self.tensors["vector"]).sum(-1) + self.tensors["bias"]
