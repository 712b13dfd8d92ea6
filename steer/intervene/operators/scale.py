"""Scaling along a direction; the factor can be learned, as in activation scaling (Stoehr et al. 2024, arXiv 2410.04962)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.low_rank import LinearLowRank, listed, numbers, unit
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("scale")
class Scale(LinearLowRank):
    """h + strength * (factor - 1) (h·u) u: damps, doubles or reflects what h has along a direction; factor 0 ablates it.

    Args:
        direction: [width] or [slots, width]; only its direction counts.
        factor: a number or one per row slot; it can be learned.

    Raises:
        ConfigError: a direction of length 0.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.Scale(vector, factor=0.5), "layers.12.output"))
    """

    parts = ("direction", "factor")
    learnable = ("factor",)
    reads = writes = "direction"

    def __init__(self, direction: Tensor, factor: float | Tensor) -> None:
        u, _ = unit(direction, "direction of 'scale'")
        super().__init__({"direction": u, "factor": numbers(factor, "factor")}, u.shape[-1])

    def factor(self, per_row: RowTensors) -> Tensor:
        return per_row["factor"] - 1.0

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"scale": bank["factor"].flatten(1)}

    def describe(self) -> str:
        return f"multiply the projection by {listed(self.tensors['factor'])}"
