"""Statistics of paired differences: the sign-flip test, its correction for many tests, and division by a spread.

Everything is computed in fp64 on the CPU; a column per direction, a row per prompt.
"""

from __future__ import annotations

from functools import lru_cache

import torch
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
    signs = _every_sign(n) if n <= EXACT else _random_signs(n, draws, seed)  # [patterns, n]
    as_large = torch.zeros_like(observed)
    for block in signs.split(BLOCK):
        as_large += (block @ columns).abs_().ge_(threshold).sum(0)  # [block, k] -> [k]
    p = as_large / len(signs) if n <= EXACT else (as_large + 1) / (draws + 1)
    return torch.where(torch.isfinite(observed), p, torch.nan)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p values that control the false discovery rate (Benjamini and Hochberg 1995).

    Args:
        p: [m]; nan entries stay nan and count as no test.
    """
    q = torch.full_like(p, torch.nan, dtype=torch.float64)
    tested = torch.isfinite(p)
    if m := int(tested.sum()):
        ordered, index = p[tested].double().sort(descending=True)
        raw = ordered * m / torch.arange(m, 0, -1)
        q[tested.nonzero()[:, 0][index]] = raw.cummin(0).values.clamp(max=1)
    return q


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
    """[draws, n] of 1 and -1; the sites of a measurement share them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8).double() * 2 - 1


def _no_pairs() -> ConfigError:
    remedy = "give the difference of at least one prompt or item between the two states"
    return ConfigError("a sign-flip test needs pairs", expected="at least one", found="none", remedy=remedy)
