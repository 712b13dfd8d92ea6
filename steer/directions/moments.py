"""Statistics of pooled activations, by class, from one streaming pass: everything that an extractor may ask for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.directions.scatter import Scatter
from steer.errors import ConfigError
from steer.model.accumulator import TextAccumulator, pool

# what an extractor may ask for beyond the class means; nothing of it is kept unless a chosen method does
NEEDS = {
    "scatter": "[width, width] fp64, sum of h h^T over all texts; the texts instead, where they are fewer than the dimensions",
    "differences": "the same for the differences of pairs; without pairs, `scatter` in its place",
    "texts": "[texts, width] fp32, the pooled activations themselves",
}


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
            self.second.addmm_(x.mT, x)

    @property
    def mean(self) -> Tensor:
        return self.first / self.n

    def copy(self) -> Moments:
        return Moments(self.n, self.first.clone(), None if self.second is None else self.second.clone())


class ContrastMoments(TextAccumulator):
    """Accumulator of one site: class means, the mean size of an activation, and what extractors need beyond them.

    No class needs a second moment of its own: with the class means, that of all texts gives the covariance within classes and in total.

    Args:
        is_positive: [texts] bool, whether each text of the capture is positive; in pairs, texts 2i and 2i + 1 belong together.
        paired: the texts are pairs.
        needs: keys of `NEEDS`.

    Attributes:
        positive, negative: moments of the classes, first order only.
        all: of all texts, with `scatter`. differences: of pair differences, with `differences`.
        texts: [texts, width] fp32, in the order of the capture; None unless asked for, or in place of second moments.
    """

    def __init__(self, is_positive: Tensor, paired: bool, needs: Collection[str] = ()) -> None:
        self.is_positive = is_positive
        self.paired = paired
        self.needs = {"scatter" if need == "differences" and not paired else need for need in needs}
        self.positive = Moments.empty(0, False)
        self.negative = Moments.empty(0, False)
        self.all = Moments.empty(0, False)
        self.differences = Moments.empty(0, False)
        self.texts: Tensor | None = None
        self.norm = 0.0
        self.tokens = 0.0

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, width + 2]: the mean over the span of each text, the sum of |h| over its tokens, and their number."""
        sizes = torch.stack([(torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32) * weight).sum(1), weight.sum(1)], 1)
        return torch.cat([pool(h, weight), sizes], 1)

    def add(self, values: Tensor, rows: Tensor) -> None:
        pooled = values[:, :-2]
        if not self.tokens:
            self._allocate(pooled.shape[1])
        side = self.is_positive[rows]
        self.positive.add(pooled[side])
        self.negative.add(pooled[~side])
        if self.all.second is not None:
            self.all.add(pooled)
        if self.differences.second is not None:
            self.differences.add(pooled[side].double() - pooled[~side].double())
        if self.texts is not None:
            self.texts[rows] = pooled
        self.norm += float(values[:, -2].sum(dtype=torch.float64))
        self.tokens += float(values[:, -1].sum(dtype=torch.float64))

    def _allocate(self, width: int) -> None:
        self.positive = Moments.empty(width, False)
        self.negative = Moments.empty(width, False)
        few = len(self.is_positive) < width
        self.all = Moments.empty(width, "scatter" in self.needs and not few)
        self.differences = Moments.empty(width, "differences" in self.needs and not few)
        if "texts" in self.needs or few and self.needs:
            self.texts = torch.full((len(self.is_positive), width), float("nan"))

    def copy(self, needs: Collection[str]) -> ContrastMoments:
        """The same with tensors of its own, for a method that may write to them.

        Args:
            needs: what the method reads; nothing else of any size is copied.
        """
        copied = ContrastMoments(self.is_positive.clone(), self.paired, needs)
        copied.positive, copied.negative = self.positive.copy(), self.negative.copy()
        if "scatter" in copied.needs:
            copied.all = self.all.copy()
        if "differences" in copied.needs:
            copied.differences = self.differences.copy()
        if self.texts is not None and copied.needs:
            copied.texts = self.texts.clone()
        copied.norm, copied.tokens = self.norm, self.tokens
        return copied

    @property
    def n(self) -> int:
        """Texts seen."""
        return self.positive.n + self.negative.n

    @property
    def mean(self) -> Tensor:
        """[width], over all texts."""
        return (self.positive.first + self.negative.first) / self.n

    @property
    def gap(self) -> Tensor:
        """[width], difference of the class means."""
        return self.positive.mean - self.negative.mean

    @property
    def activation_norm(self) -> float:
        """Mean |h| over the span's tokens."""
        return self.norm / self.tokens

    def along(self, vector: Tensor) -> dict[str, float]:
        """`gap`, `mean` and `activation_norm` of a direction, see `Direction`. vector: [width]."""
        unit = vector.double() / vector.double().norm()
        return {"gap": float(self.gap @ unit), "mean": float(self.mean @ unit), "activation_norm": self.activation_norm}

    @property
    def total(self) -> Scatter:
        """Sum of (h - mean)(h - mean)^T over all texts. Raises ConfigError when it was not kept."""
        self._check_kept("scatter")
        if self.all.second is None:
            return Scatter(rows=self._texts() - self.mean)
        return Scatter(dense=self.all.second - self.n * torch.outer(self.mean, self.mean))

    @property
    def within(self) -> Scatter:
        """Sum of (h - m)(h - m)^T over all texts, m being the mean of the text's own class. Raises ConfigError when it was not kept."""
        self._check_kept("scatter")
        if self.all.second is None:
            own = torch.where(self.is_positive[:, None], self.positive.mean, self.negative.mean)  # [texts, width]
            return Scatter(rows=self._texts() - own)
        return Scatter(dense=self.all.second - sum(side.n * torch.outer(side.mean, side.mean) for side in (self.positive, self.negative)))

    def of_pairs(self) -> Scatter:
        """Sum of d d^T over the differences of pairs. Raises ConfigError when it was not kept."""
        self._check_kept("differences")
        if self.differences.second is None:
            texts = self._texts()
            return Scatter(rows=texts[self.is_positive] - texts[~self.is_positive])  # pairs are in order on both sides
        return Scatter(dense=self.differences.second)

    def collected(self) -> Tensor:
        """[texts, width] fp32. Raises ConfigError when they were not kept."""
        self._check_kept("texts")
        assert self.texts is not None
        return self.texts

    def _texts(self) -> Tensor:
        assert self.texts is not None
        return self.texts.double()

    def _check_kept(self, need: str) -> None:
        if need not in self.needs:
            raise _need_error(self, need)


def standardised(texts: Tensor) -> Tensor:
    """[texts, width] about their mean, in units of the root mean square over all dimensions.

    One unit for all dimensions: to divide each by its own deviation would blow up those that hardly vary, and turn the direction of a probe
    towards them.
    """
    centred = texts - texts.mean(0)
    return centred / centred.square().mean().sqrt().clamp_min(1e-12)


def _need_error(moments: ContrastMoments, need: str) -> ConfigError:
    return ConfigError(
        f"'{need}' was not kept in this pass",
        expected=f"ContrastMoments with needs={sorted({*moments.needs, need})}",
        found=f"needs={sorted(moments.needs)}",
        remedy="register the extractor with the `needs` that it reads, see steer.directions.moments.NEEDS",
    )
