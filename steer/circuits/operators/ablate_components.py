"""Ablation of components towards a constant: heads at `attn.z`, neurons at `mlp.neurons`, whole parts at their output.

Mean ablation is that of Wang et al. 2022 (IOI, arXiv 2211.00593) where the constant is a mean over texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.low_rank import same_width
from steer.intervene.operator import OPERATORS, Operator, RowTensors, same_slots, slotted


@OPERATORS.register("ablate_components")
class AblateComponents(Operator):
    """h + strength * amount * (constant - h), channel by channel: mean ablation where the constant is a mean, zero ablation where it is 0.

    Strength and amounts above 1 go past the constant. It depends on nothing but the activation, so that it is the same with a cache.

    Args:
        amount: [width] or [slots, width] how much of each channel is ablated, 0 for the channels of other components.
        constant: the same shape, what takes its place.

    Raises:
        ConfigError: all amounts are 0. WidthError: another width of the constant.

    Example:
        >>> amount = (torch.arange(vector.shape[0]) < 4).float()  # the first four channels, which are those of head 0
        >>> plan = steer.Plan(steer.Intervention(steer.AblateComponents(amount, torch.zeros_like(amount)), "layers.12.attn.z"))
    """

    parts = ("amount", "constant")
    linear_in_strength = True

    def __init__(self, amount: Tensor, constant: Tensor) -> None:
        amount, constant = slotted(amount, 2, "amount"), slotted(constant, 2, "constant")
        same_width(self.name, amount=amount, constant=constant)
        same_slots(self.name, amount=amount, constant=constant)
        if not bool(amount.any()):
            raise _nothing()
        super().__init__({"amount": amount, "constant": constant * (amount != 0)}, amount.shape[-1])

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        amount, constant = (per_row[name].unsqueeze(1) for name in self.parts)  # [batch or 1, 1, width]
        return (strength * amount * (constant - h)).to(h.dtype)

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        amount = self.tensors["amount"]
        return f"ablate {int((amount != 0).any(0).sum())} of {amount.shape[-1]} channels to constants"


def _nothing() -> ConfigError:
    return ConfigError("'ablate_components' has nothing to ablate", expected="an amount that is not 0", found=torch.zeros(1).tolist(),
                       remedy="give the channels of a component the amount 1")  # fmt: skip
