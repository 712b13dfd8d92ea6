"""Low-rank linear subspace ReFT, LoReFT (Wu et al. 2024, arXiv 2404.03592, section 3.2)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.errors import ConfigError
from steer.intervene.low_rank import LowRank, orthonormal, orthonormalised, same_width
from steer.intervene.operator import OPERATORS, RowTensors, slotted


@OPERATORS.register("loreft")
class LoReFT(LowRank):
    """h + strength * (W h + b - R h) R^T: learns an edit in a small subspace, an affine function of h (LoReFT).

    The rows of R stay orthonormal while they are learned: the parameter A may be any matrix, and R = L^-1 A with L L^T = A A^T, which is
    Gram-Schmidt, smooth in A, and A itself as long as that is orthonormal.

    Args:
        rotation: [rank, width] or [slots, rank, width] R; made orthonormal here.
        weight: the same shape, W.
        bias: [rank] or [slots, rank] b.

    Raises:
        ConfigError: dependent rows, or shapes that do not fit. WidthError: different widths.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.LoReFT.initial(vector.shape[0], rank=4).train(), "layers.12.output"))
        >>> optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-3)
    """

    parts = learnable = ("rotation", "weight", "bias")
    linear_in_strength = True

    def __init__(self, rotation: Tensor, weight: Tensor, bias: Tensor) -> None:
        rotation, weight = orthonormal(rotation, "rows of the rotation"), slotted(weight, 3, "weight")
        bias = slotted(bias, 2, "bias").unsqueeze(1)
        same_width(self.name, rotation=rotation, weight=weight)
        ranks = rotation.shape[-2], weight.shape[-2], bias.shape[-1]
        if len(set(ranks)) > 1:
            raise ConfigError(
                "the ranks of 'loreft' differ",
                expected="the same number of rows in rotation and weight, and of entries in bias",
                found=ranks,
                remedy="give R and W as [rank, width] and b as [rank]",
            )
        super().__init__({"rotation": rotation, "weight": weight, "bias": bias}, rotation.shape[-1])

    @classmethod
    def initial(cls, width: int, rank: int = 4, seed: int = 0) -> Self:
        """One to be trained: a random subspace, and W = R, b = 0, with which it changes nothing yet."""
        whole_number(width, "width of 'loreft'", least=1)
        whole_number(rank, "rank of 'loreft'", least=1)
        rows = orthonormal(torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)), "rows of the rotation")
        return cls(rows, rows[0], torch.zeros(rank))

    def read_and_write(self, per_row: RowTensors) -> tuple[Tensor, Tensor]:
        rotation = per_row["rotation"]
        if isinstance(self.tensors["rotation"], nn.Parameter):
            rotation = orthonormalised(rotation)
        return per_row["weight"] - rotation, rotation

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * (x + per_row["bias"])

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"scale": 2.0, "bias": bank["bias"].flatten(1)}

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        return f"LoReFT of rank {self.tensors['rotation'].shape[1]}"
