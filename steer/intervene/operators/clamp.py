"""Clamping a projection: the activation is moved along a direction until its projection lies in a range.

With one bound it is the activation capping of Lu et al. 2026 (The Assistant Axis, arXiv 2601.10387).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.low_rank import LowRank, listed, numbers, unit
from steer.intervene.operator import OPERATORS, RowTensors, same_slots


@OPERATORS.register("clamp")
class Clamp(LowRank):
    """h + strength * (clamp(h·u, low, high) - h·u) u: keeps the projection on a direction in a range, or at a value such as its mean.

    Args:
        direction: [width] or [slots, width]; only its direction counts.
        value: where the projection is put, a number or one per row slot. Its mean is mean ablation along u: for a `Direction` that was
            extracted, `Clamp(direction.vector, direction.metric("mean"))`.
        low, high: instead of `value`, the ends of the range; None for an open end.

    Raises:
        ConfigError: a direction of length 0; both a value and a range, or neither; an empty range.

    Example:
        >>> clamp = steer.Clamp(direction.vector, direction.metric("mean"))
        >>> plan = steer.Plan(steer.Intervention(clamp, direction.site))
    """

    parts = ("direction",)
    linear_in_strength = True
    reads = writes = "direction"

    def __init__(
        self,
        direction: Tensor,
        value: float | Tensor | None = None,
        *,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
    ) -> None:
        u, _ = unit(direction, "direction of 'clamp'")
        bounds = {name: end for name, end in (("value", value), ("low", low), ("high", high)) if end is not None}
        if not bounds or ("value" in bounds and len(bounds) > 1):
            raise ConfigError(
                "'clamp' needs a value or a range", expected="value, or low, high or both", found=bounds or "neither", remedy="e.g. low=0.0"
            )
        ends = {"low": value, "high": value} if "value" in bounds else bounds
        tensors = {name: numbers(end, f"{name} of 'clamp'") for name, end in ends.items() if end is not None}
        same_slots(self.name, direction=u, **tensors)
        if len(tensors) == 2 and not bool((tensors["low"] <= tensors["high"]).all()):
            found = f"{listed(tensors['low'])} to {listed(tensors['high'])}"
            raise ConfigError("the range of 'clamp' is empty", expected="low <= high", found=found, remedy="exchange the two")
        super().__init__({"direction": u, **tensors}, u.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        low, high = (per_row[name] if name in self.tensors else None for name in ("low", "high"))
        return strength * (x.clamp(low, high) - x)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {name: bank[name].flatten(1) for name in ("low", "high") if name in self.tensors}

    def is_affine(self) -> bool:
        return "low" in self.tensors and "high" in self.tensors and torch.equal(self.tensors["low"], self.tensors["high"])

    def describe(self) -> str:
        low, high = (listed(self.tensors[name]) if name in self.tensors else "" for name in ("low", "high"))
        return f"clamp the projection to {low if low == high else f'[{low} .. {high}]'}"
