"""Is a shift real (sign flips), how large is it (in baseline SD), and is it about this direction (three z values)?

All statistics are fp64 tensors on the CPU; a column per direction, a row per prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer.errors import ConfigError

EXACT = 14  # up to 2^14 sign patterns are enumerated


def sign_flip_p(differences: Tensor, *, draws: int = 9999, seed: int = 0) -> Tensor:
    """Two-sided paired permutation test of mean = 0 under random signs (Fisher 1935).

    Needs differences that are symmetric about 0 under the null, not normal ones. Exact for up to 14 pairs; otherwise random signs, with the
    observed pattern counted among them, so that p is never 0 (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).

    Args:
        differences: [n, k], one column per test; all columns get the same signs.
        draws: random sign patterns above 14 pairs; the smallest p is 1 / (draws + 1).

    Returns:
        [k]; nan for a column that is not finite.
    """
    n = differences.shape[0]
    if n == 0:
        remedy = "give the difference of at least one prompt or item between the two states"
        raise ConfigError("a sign-flip test needs pairs", expected="at least one", found="none", remedy=remedy)
    d = differences.detach().double().cpu()
    observed = d.sum(0).abs()
    # Equal sums come out different in the last digits when they are added up in another order, and must still count as equal.
    threshold = observed - 1e-9 * d.abs().sum(0)
    if n <= EXACT:
        patterns = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n) & 1  # the other half is this one with all signs swapped
        p = ((1.0 - 2.0 * patterns.double()) @ d).abs().ge(threshold).double().mean(0)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8).double() * 2 - 1
        p = ((signs @ d).abs().ge(threshold).double().sum(0) + 1) / (draws + 1)
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


def z_controls(effect: Tensor, controls: Tensor) -> Tensor:
    """Effects against those of random control directions of the same site.

    The sign of a random direction is arbitrary, so the controls' spread is their root mean square about 0. With c controls the null
    is close to Student's t with c degrees of freedom: |z| > 2.1 for 5 % with 16.

    Args:
        effect: [k] in baseline SD, each in its own.
        controls: [c] likewise, c >= 1.
    """
    return standardise(effect, controls.square().mean().sqrt())


def z_isotropic(shift: Tensor, units: Tensor) -> Tensor:
    """Projection of the mean shift against that of isotropic random directions: cos(shift, unit) * sqrt(width).

    This is the exact limit of infinitely many isotropic controls, whose projection on `shift` has the variance |shift|^2 / width.

    Args:
        shift: [width] mean state minus baseline mean state.
        units: [k, width], each of length 1.
    """
    return standardise(units @ shift, shift.norm() / math.sqrt(len(shift)))


def z_covariance(shift: Tensor, units: Tensor, baseline: Tensor) -> Tensor:
    """Projection of the mean shift against that of random directions drawn with the baseline's covariance C.

    Their projection on `shift`, at a mean square length of 1, has the variance shift' C shift / trace C. Few dominant directions carry
    most of C, which makes this the strictest of the three; it cannot see more dimensions than there are prompts.

    Args:
        shift: [width].
        units: [k, width], each of length 1.
        baseline: [n, width] states of the baseline.
    """
    centred = baseline - baseline.mean(0)
    return standardise(units @ shift, (centred @ shift).norm() / centred.norm())
