"""One feature of a sparse autoencoder or transcoder as a gate. Ours, after CAST (Lee et al. 2024, arXiv 2409.05907)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.gate import GATES, SiteGate, one_number
from steer.intervene.low_rank import same_width, widened
from steer.intervene.operator import slotted
from steer.model.context import ForwardContext


@GATES.register("feature")
class FeatureGate(SiteGate):
    """Opens where the pre-activation (h - b_dec)·W_enc[f] + b_enc[f] of a ReLU or JumpReLU feature exceeds a threshold.

    Args:
        encoder: [width] W_enc[f].
        bias: b_enc[f], one number in units of activations of the feature.
        threshold: activation, one number, above which it counts as active; at least the feature's own JumpReLU threshold.
        center: [width] b_dec where the dictionary subtracts it first, else None.
        options: site, per, over, pool, sharpness, see `SiteGate`.

    Example:
        >>> gate = steer.FeatureGate(dictionary.encoder_rows([3])[0], bias=-1.0, threshold=0.5)
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", gate=gate))
    """

    learnable = ("encoder", "bias")

    def __init__(
        self, encoder: Tensor, bias: float | Tensor = 0.0, threshold: float | Tensor = 0.0, center: Tensor | None = None, **options: Any
    ) -> None:
        encoder = slotted(encoder, 2, "encoder row")
        bias, threshold = one_number(bias, "bias of a feature"), one_number(threshold, "threshold of a feature")
        if center is not None:  # folded into the bias
            center = slotted(center, 2, "decoder bias")
            same_width("feature", encoder=encoder, center=center)
            bias = bias - (center * encoder).sum(-1)
        super().__init__({"encoder": encoder, "bias": bias, "threshold": threshold}, encoder.shape[-1], **options)

    def margin(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        return (widened(h) * self.tensors["encoder"]).sum(-1) + self.tensors["bias"] - self.tensors["threshold"]
