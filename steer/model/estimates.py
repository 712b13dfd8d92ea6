"""Estimates with 95 % intervals: means by Student's t, shares by Wilson's score, correlations by Fisher's z, anything by a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are None where n says nothing of the spread.

    Attributes:
        n: what it is a mean over.
        value, low, high: the number and the ends, in the unit of what was measured.

    Example:
        >>> steer.bias.Estimate(54.0, 51.5, 56.5, n=200).written(1)
        '54.0 [51.5, 56.5]'
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


class Bootstrap:
    """Intervals of means over items, and of what is made of several of them, by drawing the items again, the same draws for all.

    Where all items agree, so do all draws: an interval of no width says that nothing else was seen, not that nothing else can be.

    Args:
        items: number of them.
        draws, seed: of the bootstrap.

    Example:
        >>> Bootstrap(3).estimate({"score": [1.0, 0.0, None]}, lambda means: means["score"])
        Estimate(value=0.5, low=0.0, high=1.0, n=2)
    """

    def __init__(self, items: int, *, draws: int = 2000, seed: int = 0) -> None:
        chance = np.random.default_rng(seed)
        # [draws, items] how often each item was drawn
        self._counts = chance.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64) if items else None

    def estimate(self, values: Mapping[str, Sequence[float | None]], of: Callable[[Mapping[str, Any]], Any]) -> Estimate | None:
        """A function of means with its percentile interval; None where one of the means is of nothing.

        Args:
            values: by name, one for each item, None where it has none.
            of: of the means by name: numbers for the items as they are, arrays [draws] for the draws.
        """
        tables = {name: np.array([math.nan if x is None else x for x in column], dtype=np.float64) for name, column in values.items()}
        n = min((int((~np.isnan(table)).sum()) for table in tables.values()), default=0)
        if n == 0 or self._counts is None:
            return None
        value = float(of({name: np.nanmean(table) for name, table in tables.items()}))
        if n == 1:
            return Estimate(value)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = of({name: self._drawn(table) for name, table in tables.items()})  # [draws]; NaN where none of the items was drawn
        tail = 50 * (1 - LEVEL)
        low, high = np.nanpercentile(drawn, [tail, 100 - tail])
        return Estimate(value, float(low), float(high), n)

    def mean(self, values: Sequence[float | None]) -> Estimate | None:
        """Of items that have a value; None of nothing."""
        return self.estimate({"mean": values}, lambda means: means["mean"])

    def _drawn(self, table: Any) -> Any:
        """[draws] mean of each draw."""
        assert self._counts is not None
        has = ~np.isnan(table)
        return (self._counts @ np.where(has, table, 0.0)) / (self._counts @ has)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text
