"""Ablation followed by addition: the activation loses what it has along a direction, and gets a set amount of it.

The operator is one that the library steering-vectors has; that less is ablated at strengths below 1 is ours.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from steer.intervene.low_rank import LowRank, listed, unit
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("ablate_then_add")
class AblateThenAdd(LowRank):
    """h - min(|s|, 1) (h·q) q + s v, with q = v / |v| and s the strength: every token gets the same amount of v, whatever it had.

    The strength scales v. What is removed grows with it up to |s| = 1, from where on all of it is gone, so that s = 0 leaves h alone and
    small strengths do little. Directions that differ from v are ablated by an `Ablate` before an `Add` at the same site.

    Args:
        vector: [width] or [slots, width], with the length that strength 1 gives.

    Raises:
        ConfigError: a vector of length 0.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.AblateThenAdd(vector), "layers.12.output"))
    """

    parts: ClassVar[tuple[str, ...]] = ("direction", "step")
    reads = writes = "direction"

    def __init__(self, vector: Tensor) -> None:
        direction, length = unit(vector, "vector to ablate, then add")
        super().__init__({"direction": direction, "step": length}, direction.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * per_row["step"] - strength.abs().clamp(max=1.0) * x

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        if strength.shape[0] > 1:  # of rows, and these numbers are of slots
            return None
        share, steps = 1.0 - strength.abs().clamp(max=1.0).view(1, 1), strength.view(1, 1) * bank["step"].flatten(1)
        return {"scale": share, "shift": steps, "strength": 1.0}

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        return f"ablate along v, then add v, |v| = {listed(self.tensors['step'])}"
