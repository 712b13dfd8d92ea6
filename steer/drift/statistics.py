"""Statistics of paired differences: the sign-flip test, its correction for many tests, a test of a direction, and division by a spread.

Everything is computed in fp64 on the CPU; a column per direction, a row per prompt.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy import stats
from torch import Tensor

from steer.errors import ConfigError

EXACT = 14  # up to 2^14 sign patterns are enumerated
BLOCK = 128  # sign patterns a matrix product: their sums over 1,024 columns are 1 MiB and stay in the cache


def sign_flip_p(differences: Tensor, *, draws: int = 9999, seed: int = 0) -> Tensor:
    """Two-sided paired permutation test of mean = 0 under random signs (Fisher 1935).

    Needs differences that are symmetric about 0 under the null, not normal ones. Exact for up to 14 pairs; otherwise random signs, with the
    observed pattern counted among them, so that p is never 0 (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).

    Args:
        differences: [n, k], one column per test; all columns get the same signs.
        draws: random sign patterns above 14 pairs; the smallest p is 1 / (draws + 1).

    Returns:
        [k]; nan for a column that is not finite.

    Raises:
        ConfigError: there are no pairs.

    Example:
        >>> sign_flip_p(torch.tensor([[0.3], [0.4], [0.1], [0.5]]))
        tensor([0.1250], dtype=torch.float64)
    """
    n = differences.shape[0]
    if n == 0:
        raise _no_pairs()
    columns = differences.detach().double().cpu()
    observed = columns.sum(0).abs()  # [k]
    # Equal sums come out different in the last digits when they are added up in another order, and must still count as equal.
    threshold = observed - 1e-9 * columns.abs().sum(0)
    signs = sign_patterns(n, draws=draws, seed=seed)  # [patterns, n]
    as_large = torch.zeros_like(observed)
    for block in signs.split(BLOCK):
        as_large += (block.double() @ columns).abs_().ge_(threshold).sum(0)  # [block, k] -> [k]
    p = as_large / len(signs) if n <= EXACT else (as_large + 1) / (draws + 1)
    return torch.where(torch.isfinite(observed), p, torch.nan)


def sign_patterns(n: int, *, draws: int = 9999, seed: int = 0) -> Tensor:
    """Signs of a sign-flip test of n pairs, [patterns, n] of 1 and -1, of any dtype.

    Up to 14 pairs these are all patterns, half of them left out because they are the others with all signs swapped; above that random
    ones, to which the observed pattern, all 1, is still to be added.
    """
    return _every_sign(n) if n <= EXACT else _random_signs(n, draws, seed)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p values that control the false discovery rate (Benjamini and Hochberg 1995).

    Args:
        p: [m]; nan entries stay nan and count as no test.
    """
    q = torch.full_like(p, torch.nan, dtype=torch.float64)
    tested = torch.isfinite(p)
    if bool(tested.any()):
        q[tested] = torch.from_numpy(stats.false_discovery_control(p[tested].double().numpy()))
    return q


def cosine_p(cosines: Tensor, states: Tensor, *, draws: int = 9999, seed: int = 0) -> Tensor:
    """Two-sided p of cosines between a direction and a shift, when both are random and vary as the states do.

    States of a language model vary along few of their dimensions, and so do directions that are made from them and shifts of their mean:
    two that have nothing to do with each other lie much closer than two isotropic ones. So pairs are drawn with the covariance of the
    states. Fewer states than dimensions span fewer than there are, in which pairs lie closer still; the tangents of the drawn angles are
    corrected for that by the effective number of dimensions, (trace C)^2 / trace C^2, of the sample and of the population (the latter
    estimated without bias for normal states).

    Args:
        cosines: [k].
        states: [n, width].
        draws: pairs; the smallest p is 1 / (draws + 1).

    Returns:
        [k]; nan for fewer than three states, or states that do not vary.
    """
    n, width = states.shape
    centred = states - states.mean(0)
    gram = centred @ centred.mT  # [n, n]: everything that is needed of the covariance
    if n < 3 or not bool(gram.trace() > 0):
        return torch.full_like(cosines, torch.nan)
    one, other = _random_normal(n, draws, seed)  # [draws, n]
    lengths = ((one @ gram * one).sum(1) * (other @ gram * other).sum(1)).sqrt()
    drawn = ((one @ gram * other).sum(1) / lengths).abs()  # [draws]
    tangents = drawn / (1 - drawn.square()).clamp(min=1e-15).sqrt()  # of the angles from a right angle
    of_sample, of_population = _effective_dimensions(gram, width)
    tangents = tangents * math.sqrt(min(1.0, (of_sample - 1) / max(of_population - 1, 1e-9)))
    drawn = (tangents / (1 + tangents.square()).sqrt()).sort().values
    at_least = draws - torch.searchsorted(drawn, cosines.abs() - 1e-12)  # [k]
    return torch.where(torch.isfinite(cosines), (at_least + 1) / (draws + 1.0), torch.nan).double()


def _effective_dimensions(gram: Tensor, width: int) -> tuple[float, float]:
    """(trace C)^2 / trace C^2 of the covariance of a sample, and an estimate for the population that it is drawn from.

    Args:
        gram: [n, n] inner products of the centred sample.
    """
    m = len(gram) - 1  # degrees of freedom
    trace, square = float(gram.trace()) / m, float(gram.square().sum()) / m**2
    unbiased = m**2 / ((m - 1) * (m + 2)) * (square - trace**2 / m)  # E is trace C^2
    squared_trace = trace**2 - 2 * unbiased / m
    population = squared_trace / unbiased if unbiased > 0 else math.inf
    return trace**2 / square, min(max(population, 1.0), width)


def standardise(change: Tensor, sd: Tensor) -> Tensor:
    """change / sd; 0 where nothing changed, also where the baseline does not vary."""
    return torch.where(change == 0, change, change / sd)


@lru_cache(maxsize=1)
def _every_sign(n: int) -> Tensor:
    """[2^(n-1), n] of 1 and -1: half of the patterns, since the other half is this one with all signs swapped."""
    patterns = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n) & 1
    return 1.0 - 2.0 * patterns.double()


@lru_cache(maxsize=1)
def _random_signs(n: int, draws: int, seed: int) -> Tensor:
    """[draws, n] of 1 and -1, in one byte each: there may be 10,000 items. The sites of a measurement share them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8) * 2 - 1


@lru_cache(maxsize=1)
def _random_normal(n: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two times [draws, n]; the sites of a measurement share them."""
    drawn = torch.randn(2, draws, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn[0], drawn[1]


def _no_pairs() -> ConfigError:
    remedy = "give the difference of at least one prompt or item between the two states"
    return ConfigError("a sign-flip test needs pairs", expected="at least one", found="none", remedy=remedy)
