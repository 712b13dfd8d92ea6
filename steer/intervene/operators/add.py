"""Activation addition: h + strength * v (Turner et al. 2023, arXiv 2308.10248; Rimsky et al. 2023, arXiv 2312.06681)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from steer import kernels
from steer.intervene.operator import OPERATORS, Operator, RowTensors, slotted


@OPERATORS.register("add")
class Add(Operator):
    """h + strength * v: adds a steering vector, the same to every token.

    Args:
        vector: [width], or [slots, width] when rows of one batch carry different vectors.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output", scope="response", strength=4.0))
        >>> with plan.attached(model):
        ...     model.generate(**prompt, max_new_tokens=2)
    """

    parts = ("vector",)
    learnable: ClassVar[tuple[str, ...]] = ("vector",)
    additive = True
    linear_in_strength = True

    def __init__(self, vector: Tensor) -> None:
        vector = slotted(vector, 2, "steering vector")
        super().__init__({"vector": vector}, vector.shape[-1])

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        vector = per_row["vector"]  # which broadcasts as it is where all rows share one: a view less at every site of every decoded token
        return (strength * (vector if vector.shape[0] == 1 else vector.unsqueeze(1))).to(h.dtype)

    def fused(self, h: Tensor, strength: Tensor, mask: Tensor | None, rows: Tensor | None, preserve_norm: bool) -> Tensor | None:
        slots = rows if self.slots > 1 else None
        if slots is None and not preserve_norm:  # two passes over memory as it is
            return None
        return kernels.steer_add(h, self.tensors["vector"], strength, mask, slots, preserve_norm)

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        return f"add v, |v| = {', '.join(f'{norm:.4g}' for norm in self.tensors['vector'].norm(dim=-1).tolist())}"
