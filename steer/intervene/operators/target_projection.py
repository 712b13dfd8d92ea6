"""Steering to a target projection, StTP (Herbster et al. 2026, arXiv 2604.08169)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.intervene.low_rank import LowRank, listed, numbers, unit
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("target_projection")
class TargetProjection(LowRank):
    """h + strength * (target - h·u) u where h·u < threshold: lifts only tokens that fall short, up to a target (StTP).

    Tokens beyond the threshold are left alone.

    Args:
        direction: [width] or [slots, width], towards the wanted side; only its direction counts.
        target: the projection they get, e.g. the mean of wanted texts, a number or one per row slot.
        threshold: projection below which they get it, e.g. a low quantile of wanted texts, a number or one per row slot; the target when
            None.

    Raises:
        ConfigError: a direction of length 0.

    Example:
        >>> lift = steer.TargetProjection(vector, target=2.0, threshold=0.5)
        >>> plan = steer.Plan(steer.Intervention(lift, "layers.12.output"))
    """

    parts = ("direction", "target", "threshold")
    linear_in_strength = True
    reads = writes = "direction"

    def __init__(self, direction: Tensor, target: float | Tensor, threshold: float | Tensor | None = None) -> None:
        u, _ = unit(direction, "direction of 'target_projection'")
        tensors = {"direction": u, "target": numbers(target, "target")}
        tensors["threshold"] = numbers(target if threshold is None else threshold, "threshold")
        super().__init__(tensors, u.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return torch.where(x < per_row["threshold"], strength * (per_row["target"] - x), 0.0)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {
            "read": -bank["direction"],  # so that being below a threshold is being above its negative
            "threshold": -bank["threshold"].flatten(1),
            "gated": True,
            "scale": 2.0,
            "shift": bank["target"].flatten(1),
        }

    def describe(self) -> str:
        return f"bring projections below {listed(self.tensors['threshold'])} to {listed(self.tensors['target'])}"
