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
    def empty(cls, width: int, second: bool) -> Moments:
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64) if second else None)

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
    """Accumulator of one site: moments of both classes and the mean size of an activation.

    Only one [width, width] matrix is kept: `spread` holds the pair differences of a paired set, all texts of an unpaired one.

    Args:
        is_positive: [texts] bool, whether each text of the capture is positive; in pairs, texts 2i and 2i + 1 belong together.
        second: keep sum h h^T of `spread` too.
    """

    def __init__(self, is_positive: Tensor, paired: bool, second: bool) -> None:
        self.is_positive, self.paired, self.second = is_positive, paired, second
        self.positive = self.negative = self.spread = Moments.empty(0, False)
        self.norm = self.tokens = 0.0

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        if not self.tokens:
            width = h.shape[-1]
            self.positive, self.negative, self.spread = (Moments.empty(width, second) for second in (False, False, self.second))
        pooled = pool(h, weight).cpu()
        side = self.is_positive[rows]
        self.positive.add(pooled[side])
        self.negative.add(pooled[~side])
        self.spread.add(pooled[side].double() - pooled[~side].double() if self.paired else pooled)
        self.norm += float((h.float().norm(dim=-1) * weight).sum())
        self.tokens += float(weight.sum())

    @property
    def gap(self) -> Tensor:
        """[width], difference of the class means."""
        return self.positive.mean - self.negative.mean

    @property
    def activation_norm(self) -> float:
        """Mean |h| over the span's tokens."""
        return self.norm / self.tokens
