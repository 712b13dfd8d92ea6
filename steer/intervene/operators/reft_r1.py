"""Rank-1 representation finetuning, ReFT-r1 (Wu et al. 2025, AxBench, arXiv 2501.17148, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.intervene.low_rank import LowRank, coordinates, listed, moved, numbers, orthonormalised, unit, widened, without_autocast
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("reft_r1")
class ReftR1(LowRank):
    """h + strength * level * w, level = mean of the k largest relu(h·w) in the row: learns one vector that detects and steers (ReFT-r1).

    Only tokens that it acts on are looked at. Without a `level`, each pass finds that of its rows, as in training; packed texts share
    theirs, and a token decoded with a cache would be alone with its own. So set the level, once the vector is learned, to what it should
    be: the paper takes the largest detection on the training texts.

    Args:
        vector: [width] or [slots, width] w; made of length 1 here, and kept so while it is learned.
        k: how many tokens.
        level: a number or one per row slot; None to take it from the row.

    Raises:
        ConfigError: a vector of length 0, or k below 1.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.ReftR1(vector, k=2).train(), "layers.12.output"))
        >>> optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-3)
    """

    parts = learnable = ("vector",)
    settings = ("k",)
    reads = writes = "vector"

    def __init__(self, vector: Tensor, k: int = 1, level: float | Tensor | None = None) -> None:
        whole_number(k, "number of tokens that 'reft_r1' looks at", least=1)
        w, _ = unit(vector, "vector of 'reft_r1'")
        self.k = k
        super().__init__({"vector": w[:, 0]} | ({} if level is None else {"level": numbers(level, "level")}), w.shape[-1])

    def read_and_write(self, per_row: RowTensors) -> tuple[Tensor, Tensor]:
        w = per_row["vector"].unsqueeze(1)
        if isinstance(self.tensors["vector"], nn.Parameter):
            w = orthonormalised(w)
        return w, w

    def detect(self, h: Tensor, per_row: RowTensors | None = None) -> Tensor:
        """relu(h·w) of every token, [batch, tokens] fp32: how much of the concept it has. h: [batch, tokens, width]."""
        with without_autocast(h):
            w, _ = self.read_and_write(self.tensors if per_row is None else per_row)
            return coordinates(widened(h), w).squeeze(-1).relu()

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * per_row["level"]

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        return {"shift": bank["level"].flatten(1)} if "level" in self.tensors else None

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        _, w = self.read_and_write(per_row)
        change = self.change(h, strength, per_row) if "level" in self.tensors else strength * self._level(h, mask, per_row)
        return moved(widened(h), change if mask is None else change * mask, w).to(h.dtype)

    def is_affine(self) -> bool:
        return "level" in self.tensors

    def _level(self, h: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        """Of each row, [batch, 1, 1]."""
        k = min(self.k, h.shape[1])
        if mask is None:
            return self.detect(h, per_row).unsqueeze(-1).topk(k, dim=1).values.mean(1, keepdim=True)
        acted = (mask != 0).expand(*h.shape[:-1], 1)
        # before the product, so that neither the level nor the gradient of w sees what padding may hold
        detections = self.detect(torch.where(acted, h, 0.0), per_row).unsqueeze(-1)
        return detections.topk(k, dim=1).values.sum(1, keepdim=True) / acted.sum(1, keepdim=True).clamp(1, k)

    def describe(self) -> str:
        if "level" in self.tensors:
            return f"ReFT-r1 of level {listed(self.tensors['level'])}"
        return f"ReFT-r1 of the mean of the {self.k} largest detections"
