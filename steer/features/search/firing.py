"""Firing: how well each feature tells some tokens from the others, counted over a stream of tokens for all features at once."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 15  # of a number that values are counted by: sign, exponent and 6 bits of mantissa
ZERO = 1 << (BITS - 1)
COLUMNS = ("average_precision", "auroc", "f1", "precision", "recall", "density", "maximum")


class FiringCounts:
    """Counts values of features on all tokens and on the marked ones, whatever the number of tokens, in cells of 1.6 % of a value.

    Args:
        width: number of features.
        concepts: number of marks that each token has.
    """

    def __init__(self, width: int, concepts: int) -> None:
        self.width = width
        self.total = torch.zeros(1 + concepts, dtype=torch.long)  # of the tokens: all, and those of each concept
        self.maximum = torch.zeros(width)
        self.sum = torch.zeros(width, dtype=torch.float64)
        self._keys = torch.empty(0, dtype=torch.long)
        self._counts = torch.empty(0, 1 + concepts, dtype=torch.long)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, f: Tensor, marks: Tensor) -> None:
        """f: [tokens, features] fp32. marks: [tokens, concepts] bool."""
        marks = torch.cat([torch.ones(len(marks), 1, dtype=torch.bool), marks], 1).long()  # [tokens, 1 + concepts]
        self.total += marks.sum(0)
        if len(f):
            self.maximum = torch.maximum(self.maximum, f.amax(0))
            self.sum += f.double().sum(0)
        token, feature = f.nonzero(as_tuple=True)
        keys = (feature << BITS) + cell_of(f[token, feature])
        self._waiting.append(_merged(keys, marks[token]))
        if sum(len(keys) for keys, _ in self._waiting) > max(len(self._keys), 2**20):
            self._merge()

    def scores(self, concept: int) -> dict[str, Tensor]:
        """[features] fp64 by the names of `COLUMNS`, of a concept by its place. On is whatever is not 0; density and
        maximum are of all tokens."""
        self._merge()
        on = self._on()
        tokens, marked = int(self.total[0]), int(self.total[1 + concept])
        precision = on[:, 1 + concept] / on[:, 0].clamp_min(1)
        recall = on[:, 1 + concept] / max(marked, 1)
        average, auroc = self._by_threshold(on, concept)
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        values = (average, auroc, f1, precision, recall, on[:, 0] / max(tokens, 1), self.maximum.double())
        return dict(zip(COLUMNS, values, strict=True))

    def _by_threshold(self, on: Tensor, concept: int) -> tuple[Tensor, Tensor]:
        """[features] average precision and area under the ROC curve, tokens with the value 0 included; values of one cell are ties.
        NaN where no token is marked."""
        off = self.total - on.long()
        zero = (torch.arange(self.width) << BITS) + ZERO
        keys, order = torch.cat([self._keys, zero]).sort()  # by feature, then by value
        counts = torch.cat([self._counts, off])[order].double()
        feature = keys >> BITS
        positive, negative = counts[:, 1 + concept], counts[:, 0] - counts[:, 1 + concept]  # [cells]
        marked, others = float(self.total[1 + concept]), float(self.total[0] - self.total[1 + concept])
        below = [_before(part, feature, self.width) for part in (positive, negative)]
        at_least = [whole - part for whole, part in zip((marked, others), below, strict=True)]  # tokens with this value or a larger one
        precision = at_least[0] / (at_least[0] + at_least[1]).clamp_min(1)
        sums = torch.zeros(2, self.width, dtype=torch.float64)
        sums[0].index_add_(0, feature, precision * positive)
        sums[1].index_add_(0, feature, positive * (below[1] + negative / 2))
        return sums[0] / (marked or torch.nan), sums[1] / (marked * others or torch.nan)

    def summary(self) -> dict[str, Tensor]:
        """[features] fp32: density, mean where a feature is on, maximum."""
        self._merge()
        on = self._on()[:, 0]
        return {"density": (on / self.total[0].clamp_min(1)).float(), "mean": (self.sum / on.clamp_min(1)).float(), "maximum": self.maximum}

    def histogram(self, bins: int) -> Tensor:
        """[features, bins] tokens by value, in equal steps from 0 to the maximum of the feature; values below 0 are left out."""
        self._merge()
        feature, cell = self._keys >> BITS, (self._keys & (2**BITS - 1)) - ZERO
        above = cell > 0
        feature, value = feature[above], _value_of(cell[above])
        place = (value / self.maximum[feature].clamp_min(torch.finfo(torch.float32).tiny) * bins).long().clamp(0, bins - 1)
        counts = torch.zeros(self.width * bins, dtype=torch.long)
        return counts.index_add_(0, feature * bins + place, self._counts[above, 0]).view(self.width, bins)

    def _on(self) -> Tensor:
        """[features, 1 + concepts] tokens on which a feature is not 0."""
        return torch.zeros(self.width, self._counts.shape[1], dtype=torch.double).index_add_(0, self._keys >> BITS, self._counts.double())

    def _merge(self) -> None:
        if self._waiting:
            parts = [(self._keys, self._counts), *self._waiting]
            self._keys, self._counts = _merged(torch.cat([keys for keys, _ in parts]), torch.cat([counts for _, counts in parts]))
            self._waiting = []


def cell_of(values: Tensor) -> Tensor:
    """int64 numbers from 0 to 2**BITS - 1 that order values as the values are ordered; 0 is `ZERO`."""
    bits = values.float().contiguous().view(torch.int32).long()
    size = (bits & 0x7FFFFFFF) >> (32 - BITS)
    return torch.where(bits < 0, ZERO - size, ZERO + size).clamp(0, 2**BITS - 1)


def _value_of(size: Tensor) -> Tensor:
    """The middle of cells of values above 0, fp32, by their number from `ZERO`."""
    shift = 32 - BITS
    return ((size << shift) + (1 << (shift - 1))).int().view(torch.float32)


def _merged(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each key once, with the sum of its counts."""
    unique, place = keys.unique(return_inverse=True)
    return unique, torch.zeros(len(unique), counts.shape[1], dtype=torch.long).index_add_(0, place, counts)


def _before(values: Tensor, feature: Tensor, width: int) -> Tensor:
    """[cells] sum of the values of the cells of the same feature that come before."""
    running = values.cumsum(0) - values
    first = torch.searchsorted(feature, torch.arange(width))
    return running - running[first][feature]
