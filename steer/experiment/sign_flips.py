"""Sign-flip test of a mean over items, and the interval that goes with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steer.drift.statistics import BLOCK, EXACT, sign_patterns
from steer.experiment.stats import ROUNDING, Array

DRAWS = 9999


@dataclass(frozen=True)
class SignFlips:
    """A sign-flip test: p, the interval of all means that it does not reject, and the smallest p that it could have given.

    A bound is infinite where no mean is ever rejected: five items cannot give a p below 1/16.
    """

    p: float
    low: float
    high: float
    smallest_p: float


def sign_flips(values: Array, *, alpha: float, draws: int = DRAWS, seed: int = 0) -> SignFlips:
    """Two-sided sign-flip test of mean = 0 with its interval at 1 - alpha: zero lies outside exactly when p <= alpha.

    Taking m from every item and testing again rejects m when few sign patterns give a sum as large. A pattern splits the items into those
    that keep their sign and those that do not, and counts as large for all m between the means of the two subsets, the mean of all items
    being one of them; so the bounds are order statistics of subset means (Hartigan 1969, doi 10.1080/01621459.1969.10501057).

    Args:
        values: [n], one per item, symmetric about their mean.
        draws: random sign patterns above 14 items; below, all are used.

    Example:
        >>> sign_flips(np.array([0.3, 0.4, 0.1, 0.5, 0.2, 0.6]), alpha=0.05)
        SignFlips(p=0.03125, low=0.1, high=0.6, smallest_p=0.03125)
    """
    n, scale = len(values), float(abs(values).max()) or 1.0
    x = torch.as_tensor(values / scale)
    signs = sign_patterns(n, draws=draws, seed=seed)  # [patterns, n]
    beside_ones = torch.stack([x, torch.ones_like(x)], 1)  # [n, 2]
    sums = torch.cat([block.double() @ beside_ones for block in signs.split(BLOCK)]).numpy()  # [patterns, 2]
    total, flipped_sum, sign_sum = float(x.sum()), sums[:, 0], sums[:, 1]
    # Sums over the flipped and over the kept items, both twice, and their numbers, both twice.
    subsets = ((total - flipped_sum, n - sign_sum), (total + flipped_sum, n + sign_sum))
    # The pattern that flips none, or all, is the observed one: as large whatever is taken off.
    lowest = np.minimum(*(_mean(twice, counts, -np.inf) for twice, counts in subsets))  # [patterns]
    highest = np.maximum(*(_mean(twice, counts, np.inf) for twice, counts in subsets))
    if n > EXACT:
        lowest, highest = np.append(lowest, -np.inf), np.append(highest, np.inf)  # the observed pattern is not among random ones
    # Equal sums come out different in the last digits when they are added up in another order, and must still count as equal.
    tie = 1e-9 * float(x.abs().mean())
    lowest, highest = np.where(abs(lowest) <= tie, 0, lowest), np.where(abs(highest) <= tie, 0, highest)
    patterns = len(lowest)
    p = float((lowest <= 0).sum() if total >= 0 else (highest >= 0).sum()) / patterns
    rank = min(int(alpha * (1 + ROUNDING) * patterns) + 1, patterns)  # the fewest patterns that are not rejected
    low, high = np.partition(lowest, rank - 1)[rank - 1], np.partition(highest, patterns - rank)[patterns - rank]
    return SignFlips(p, float(low) * scale + 0.0, float(high) * scale + 0.0, 1 / patterns)


def _mean(sums: Array, counts: Array, of_none: float) -> Array:
    return np.divide(sums, counts, out=np.full_like(sums, of_none), where=counts > 0)
