"""Estimates with 95 % intervals: means by Student's t, shares by Wilson's score, correlations by Fisher's z."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are None where n says nothing of the spread.

    Attributes:
        n: what it is a mean over.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1

    def written(self, digits: int) -> str:
        """`54.0 [51.5, 56.5]`."""
        value = _number(self.value, digits)
        return value if self.low is None or self.high is None else f"{value} [{_number(self.low, digits)}, {_number(self.high, digits)}]"


def mean_of(values: Sequence[float] | Tensor, scale: float = 1.0) -> Estimate | None:
    """Mean with Student's interval; None of nothing."""
    x = np.asarray(values, dtype=np.float64) * scale
    if not x.size:
        return None
    mean = float(x.mean())
    if x.size < 2:
        return Estimate(mean)
    half = float(stats.t.ppf((1 + LEVEL) / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(mean, mean - half, mean + half, x.size)


def percentage_of(shares: Sequence[bool] | Sequence[float] | Tensor) -> Estimate | None:
    """Mean of hits, or of shares of hits, in percent, with Wilson's interval, which stays within 0 and 100; None of nothing.

    A share counts as one observation, however many hits it is of: repetitions of an item are no further items.
    """
    x = np.asarray(shares, dtype=np.float64)
    if not x.size:
        return None
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share, n = float(x.mean()), x.size
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(100 * share, 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0), n)


def correlation_of(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> Estimate | None:
    """Pearson's r with Fisher's interval; None for fewer than three points, or where one of both does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    result = stats.pearsonr(a, b)
    if a.size < 4 or abs(result.statistic) >= 1:  # Fisher's z has no end there
        return Estimate(float(result.statistic), n=a.size)
    interval = result.confidence_interval(LEVEL)
    return Estimate(float(result.statistic), float(interval.low), float(interval.high), a.size)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text
