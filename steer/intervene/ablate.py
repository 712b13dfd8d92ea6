"""Directional ablation: h - strength * (h Q) Q^T (Arditi et al. 2024, arXiv 2406.11717, for rank one)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.operator import OPERATORS, Operator, Pick, slotted


@OPERATORS.register("ablate")
class Ablate(Operator):
    """h - strength * (h Q) Q^T: removes the part of h in the span of the given directions; strength 1 removes all of it.

    Args:
        directions: [width], [rank, width] or [slots, rank, width]; made orthonormal here.

    Raises:
        ConfigError: directions that are zero or linearly dependent.
    """

    name = "ablate"

    def __init__(self, directions: Tensor) -> None:
        rows = slotted(directions[None] if directions.dim() == 1 else directions, 3, "directions").double()
        q, r = torch.linalg.qr(rows.mT)
        scale = r.diagonal(dim1=-2, dim2=-1).abs()
        if bool((scale.amin(-1) <= 1e-6 * rows.norm(dim=-1).amax(-1)).any()) or rows.shape[1] > rows.shape[2]:
            raise ConfigError(
                "directions to ablate are zero or linearly dependent",
                expected=f"{rows.shape[1]} independent directions",
                found=f"smallest independent part {float(scale.min()):.3g}",
                remedy="leave out the one that is zero or follows from the others",
            )
        super().__init__({"directions": q.mT.float().contiguous()}, rows.shape[-1])

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, pick: Pick) -> Tensor:
        q = pick("directions").to(h.dtype)
        weight = strength.to(h.dtype) if mask is None else strength.to(h.dtype) * mask
        if q.shape[1] == 1:
            return h - (h * q).sum(-1, keepdim=True, dtype=h.dtype) * weight * q
        if torch.is_autocast_enabled(h.device.type):  # it would round a fp32 residual stream to bf16 here
            with torch.autocast(h.device.type, enabled=False):
                return h - (h @ q.mT * weight) @ q
        return h - (h @ q.mT * weight) @ q

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Ablate:
        made = cls(**tensors, **options)
        made.tensors = tensors  # orthonormal already: to the bit what was saved
        return made

    def describe(self) -> str:
        return f"ablate a span of rank {self.tensors['directions'].shape[1]}"
