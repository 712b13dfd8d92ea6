"""Steering to the mirror projection, StMP (Herbster et al. 2026, arXiv 2604.08169)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.intervene.low_rank import LowRank, listed, numbers, unit
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("mirror")
class Mirror(LowRank):
    """h + 2 strength * (boundary - h·u) u where h·u < threshold: reflects only tokens on the wrong side of a boundary or probe (StMP).

    Tokens beyond the threshold are left alone. Strengths below 1 stop on the way, 0.5 at the boundary.

    Args:
        direction: [width] or [slots, width], towards the wanted side; only its direction counts. For a logistic regression of weights w
            and bias b it is w.
        boundary: projection at which they are reflected, a number or one per row slot; -b / |w| for that regression.
        threshold: projection below which they are, a number or one per row slot; the boundary when None.

    Raises:
        ConfigError: a direction of length 0.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.Mirror(vector, boundary=0.5), "layers.12.output"))
    """

    parts = ("direction", "boundary", "threshold")
    linear_in_strength = True
    reads = writes = "direction"

    def __init__(self, direction: Tensor, boundary: float | Tensor = 0.0, threshold: float | Tensor | None = None) -> None:
        u, _ = unit(direction, "direction of 'mirror'")
        tensors = {"direction": u, "boundary": numbers(boundary, "boundary")}
        tensors["threshold"] = numbers(boundary if threshold is None else threshold, "threshold")
        super().__init__(tensors, u.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        way = 2.0 * strength * (per_row["boundary"] - x)
        return torch.where(x < per_row["threshold"], way, 0.0)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {
            "read": -bank["direction"],  # so that being below a threshold is being above its negative
            "threshold": -bank["threshold"].flatten(1),
            "gated": True,
            "scale": 3.0,
            "shift": 2.0 * bank["boundary"].flatten(1),
        }

    def describe(self) -> str:
        return f"reflect projections below {listed(self.tensors['threshold'])} at {listed(self.tensors['boundary'])}"
