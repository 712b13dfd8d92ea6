"""First and second moments of pooled activations, by class and of pair differences, from one streaming pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.model.capture import pool


@dataclass
class Moments:
    """n, sum h and (when asked for) sum h h^T, in fp64."""

    n: int
    first: Tensor
    second: Tensor | None

    @classmethod
    def empty(cls, width: int, second: bool, device: torch.device) -> Moments:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, torch.zeros(width, width, dtype=torch.float64, device=device) if second else None)

    def add(self, x: Tensor) -> None:
        """x: [n, width]."""
        x = x.double()
        self.n += x.shape[0]
        self.first += x.sum(0)
        if self.second is not None:
            self.second += x.mT @ x

    @property
    def mean(self) -> Tensor:
        return self.first / self.n


class ContrastMoments:
    """Accumulator of one site: moments of both classes, of pair differences, and the mean size of an activation.

    Args:
        positive: whether each text of the capture is positive; in pairs, texts 2i and 2i + 1 belong together.
        second: keep sum h h^T too.
    """

    def __init__(self, positive: Tensor, paired: bool, second: bool) -> None:
        self.is_positive, self.paired, self.second = positive, paired, second
        self.positive: Moments | None = None
        self.norm = torch.zeros((), dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.float64)

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        if self.positive is None:
            self.positive, self.negative, self.difference = (Moments.empty(h.shape[-1], self.second, h.device) for _ in range(3))
        pooled = pool(h, weight)
        side = self.is_positive[rows].to(h.device)
        self.positive.add(pooled[side])
        self.negative.add(pooled[~side])
        if self.paired:
            self.difference.add(pooled[side] - pooled[~side])
        self.norm += (h.float().norm(dim=-1) * weight).sum().double().cpu()
        self.tokens += weight.sum().double().cpu()

    @property
    def activation_norm(self) -> float:
        """Mean |h| over the span's tokens."""
        return float(self.norm / self.tokens)
