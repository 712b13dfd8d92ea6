"""Directional ablation: h - strength * (h Q) Q^T (Arditi et al. 2024, arXiv 2406.11717, for rank one)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.intervene.low_rank import LinearLowRank, orthonormal
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("ablate")
class Ablate(LinearLowRank):
    """h - strength * (h Q) Q^T: removes what h has in the span of the directions; strength 1 removes all of it.

    Args:
        directions: [width], [rank, width] or [slots, rank, width]; made orthonormal here.

    Raises:
        ConfigError: directions that are zero or linearly dependent.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.Ablate(vector), ["layers.*.output"]))
        >>> with plan.attached(model):
        ...     model.generate(**prompt, max_new_tokens=2)
    """

    parts = ("directions",)
    reads = writes = "directions"

    def __init__(self, directions: Tensor) -> None:
        rows = orthonormal(directions, "directions to ablate")
        super().__init__({"directions": rows}, rows.shape[-1])

    def factor(self, per_row: RowTensors) -> float:
        return -1.0

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"scale": 0.0}

    def describe(self) -> str:
        return f"ablate a span of rank {self.tensors['directions'].shape[1]}"
