"""Affine concept erasure, LEACE (Belrose et al. 2023, arXiv 2306.03819)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.checks import tensor_of
from steer.errors import ConfigError
from steer.intervene.low_rank import LowRank, same_width
from steer.intervene.operator import OPERATORS, RowTensors, same_slots, slotted


@OPERATORS.register("erase")
class Erase(LowRank):
    """h - strength * (h - mean) right^T left: removes all that linear probes read of a concept, at the least change (LEACE).

    Unlike ablation, it reads along other rows than it writes, and from the mean of the activations, not from 0.
    `steer.directions.leace.fit_erasure` fits its tensors.

    Args:
        left: [width], [rank, width] or [slots, rank, width], the rows along which h moves.
        right: the same shape, the rows along which the concept is read; right left^T is the identity.
        mean: [width] or [slots, width] of the activations.

    Raises:
        WidthError, ConfigError: tensors that do not fit together.

    Example:
        >>> (eraser,) = steer.fit_erasure(model, contrast, ["layers.12.output"]).values()
        >>> plan = steer.Plan(steer.Intervention(steer.Erase(eraser.left, eraser.right, eraser.mean), "layers.12.output"))
    """

    parts = ("left", "right", "origin")
    linear_in_strength = True
    reads, writes = "right", "left"

    def __init__(self, left: Tensor, right: Tensor, mean: Tensor) -> None:
        left, right = (tensor_of(rows, what, "pass what fit_erasure gives") for rows, what in ((left, "left"), (right, "right")))
        left, right = (slotted(rows[None] if rows.dim() == 1 else rows, 3, what) for rows, what in ((left, "left"), (right, "right")))
        mean = slotted(mean, 2, "mean")
        same_width(self.name, left=left, right=right, mean=mean)
        same_slots(self.name, left=left, right=right, mean=mean)
        if left.shape[1] != right.shape[1]:
            raise ConfigError(
                "'erase' reads and writes along different numbers of rows",
                expected="as many rows in left as in right",
                found=f"{left.shape[1]} and {right.shape[1]}",
                remedy="take both from one fit; they may be the other way round or transposed",
            )
        origin = (mean.double().unsqueeze(1) @ right.double().mT).float()
        super().__init__({"left": left, "right": right, "origin": origin}, left.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * (per_row["origin"] - x)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"scale": 0.0, "bias": -bank["origin"].flatten(1)}

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        return f"erase what {self.tensors['right'].shape[1]} linear probe(s) read"
