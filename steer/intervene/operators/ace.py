"""Affine concept editing, ACE (Marshall, Scherlis & Belrose 2024, arXiv 2411.09003)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.low_rank import listed, numbers, same_width, unit
from steer.intervene.operator import OPERATORS, Operator, RowTensors, same_slots, slotted
from steer.intervene.operators.ablate_then_add import AblateThenAdd


@OPERATORS.register("ace")
class Ace(AblateThenAdd):
    """h - proj(h) + proj(reference) + alpha r along r: removes (alpha 0) or sets (alpha 1) a concept where plain ablation harms text (ACE).

    Ablation is measured from the reference, an activation without the concept, not from 0. alpha 0 takes the concept out of every token,
    alpha 1 puts it into every token. Strength s, as in `AblateThenAdd`, has min(|s|, 1) of the replacement and s alpha of r.

    Args:
        vector: [width] or [slots, width] r, mean activation with the concept minus mean without it; its length is the unit of alpha.
        reference: [width] or [slots, width], mean activation without the concept.
        alpha: how much of the concept, in lengths of r: 0 is none, 1 that of the concept's mean; a number or one per row slot.

    Raises:
        ConfigError: a vector of length 0. WidthError: a reference of another width.

    Example:
        >>> reference = torch.zeros_like(vector)  # the mean activation without the concept
        >>> plan = steer.Plan(steer.Intervention(steer.Ace(vector, reference, alpha=1.0), "layers.12.output"))
    """

    parts = ("direction", "step", "origin")

    def __init__(self, vector: Tensor, reference: Tensor, alpha: float | Tensor) -> None:
        direction, length = unit(vector, "vector of 'ace'")
        reference, share = slotted(reference, 2, "reference").unsqueeze(1), numbers(alpha, "alpha")
        same_width(self.name, vector=direction, reference=reference)
        same_slots(self.name, vector=direction, reference=reference, alpha=share)
        origin = (reference.double() * direction).sum(-1, keepdim=True).float()
        tensors = {"direction": direction, "step": share * length, "origin": origin}
        Operator.__init__(self, tensors, direction.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return super().change(x - per_row["origin"], strength, per_row)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        arguments = super().kernel_arguments(strength, bank)
        return None if arguments is None else {**arguments, "bias": -bank["origin"].flatten(1)}

    def describe(self) -> str:
        return f"set what h has along r to {listed(self.tensors['origin'])}, that of the reference, plus {listed(self.tensors['step'])}"
