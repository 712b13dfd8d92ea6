"""Replacement of one direction by another: concept switching.

Gaintseva et al. 2026 (MidSteer, arXiv 2605.05220) study which affine maps switch concepts best; this one reads along the vector itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.low_rank import LinearLowRank, listed, same_width, unit
from steer.intervene.operator import OPERATORS, RowTensors, same_slots, slotted


@OPERATORS.register("replace")
class Replace(LinearLowRank):
    """h + strength * (h·a / |a|^2) (b - a): turns one concept into another; what h has of vector a, it gets of vector b instead.

    Args:
        source: [width] or [slots, width] a. Lengths count: one |a| of the old becomes one |b| of the new.
        target: [width] or [slots, width] b.

    Raises:
        ConfigError: a source of length 0. WidthError: vectors of different widths.

    Example:
        >>> other = torch.roll(vector, 1)
        >>> plan = steer.Plan(steer.Intervention(steer.Replace(vector, other), "layers.12.output"))
    """

    parts = ("reader", "turn")
    reads, writes = "reader", "turn"

    def __init__(self, source: Tensor, target: Tensor) -> None:
        direction, length = unit(source, "source of 'replace'")
        target = slotted(target, 2, "target of 'replace'").unsqueeze(1)
        same_width(self.name, source=direction, target=target)
        same_slots(self.name, source=direction, target=target)
        super().__init__({"reader": direction / length, "turn": target - direction * length}, direction.shape[-1])

    def factor(self, per_row: RowTensors) -> float:
        return 1.0

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"scale": 2.0}

    def describe(self) -> str:
        return f"replace a by b, |a| = {listed(1 / self.tensors['reader'].norm(dim=-1))}"
