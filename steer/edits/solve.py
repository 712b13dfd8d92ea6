"""The linear solves of editors: from keys and what is to be written at them to the change of a weight, on the small side, in float64.

All editors with a closed form solve one problem. With a matrix M that says how dear a direction of the keys is (C^-1 for a covariance C, or
a projector), Delta = R (ridge I + K^T M K)^-1 (M K)^T has n x n numbers to invert for n keys, whatever the width f is:

    ridge = 0        Delta K = R exactly, least change in the norm of C        ROME, EMMET
    ridge = lambda   Delta = R K^T (lambda C + K K^T)^-1                       MEMIT
    M = P            Delta = R K^T P (K K^T P + L2 I)^-1                       AlphaEdit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import EditError, NonFiniteError

LEAST_PIVOT = 1e-8  # of keys scaled to length 1: below, one of them is a combination of the others
COLLINEAR = 0.99  # cosine of two keys


@dataclass(frozen=True, eq=False)
class Solved:
    """A change of a weight [d, f], u v^T, and how much of what was asked it writes.

    Attributes:
        u: [d, n]. v: [f, n]; fp64.
        strength: [n] k^T A^-1 k with A = ridge M^-1 + K K^T (and past keys): the share of what was asked for a key that is written for it
            when it is asked for alone; 1 for exact constraints.
    """

    u: Tensor
    v: Tensor
    strength: Tensor


def solve_keys(
    keys: Tensor,
    wanted: Tensor,
    metric: Callable[[Tensor], Tensor],
    ridge: float,
    *,
    past: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Solved:
    """Solves for the change that gives the keys what is wanted, at the least cost elsewhere.

    Args:
        keys: [n, f]. wanted: [n, d] change of the output at each.
        metric: M times a matrix [f, m]; symmetric and positive (semi-)definite.
        ridge: 0 for exact constraints; more gives up some of what is wanted for a smaller change.
        past: [p, f] keys of earlier edits, at which the change costs as much as at the new ones (MEMIT_seq, AlphaEdit's K_p). Only with a
            ridge.
        names: of the keys, for messages.

    Raises:
        EditError: exact constraints at keys of which one is a combination of others; it names two. NonFiniteError: the keys.
    """
    k, r = keys.double().T, wanted.double().T  # [f, n], [d, n]
    if not bool(torch.isfinite(k).all() and torch.isfinite(r).all()):
        raise _not_finite()
    cheap = metric(k).double()  # [f, n]
    gram = _symmetric(k.T @ cheap)  # [n, n]
    if past is not None and len(past):
        earlier = past.double().T.to(k.device)  # [f, p]
        cheap_earlier = metric(earlier).double()
        between = earlier.T @ cheap  # [p, n]
        weights = torch.cholesky_solve(between, _cholesky(_symmetric(earlier.T @ cheap_earlier), ridge))
        cheap = cheap - cheap_earlier @ weights
        gram = _symmetric(gram - between.T @ weights)
    if ridge == 0:
        check_independent(gram, names)
    factor = _cholesky(gram, ridge)
    u = torch.cholesky_solve(r.T.contiguous(), factor).T  # [d, n]
    inverse = torch.cholesky_inverse(factor)
    return Solved(u, cheap, 1 - ridge * inverse.diagonal())


def check_independent(gram: Tensor, names: Sequence[str] | None = None) -> None:
    """Raises EditError, naming two, when a key is a combination of the others. gram: [n, n] inner products of the keys."""
    length = gram.diagonal().clamp_min(0).sqrt()
    if bool((length <= 0).any()):
        raise _no_length(int((length <= 0).nonzero()[0]), names)
    cosines = gram / length[:, None] / length
    factor, info = torch.linalg.cholesky_ex(cosines)
    if int(info) or float(factor.diagonal().min()) ** 2 < LEAST_PIVOT:
        raise _dependent(cosines, names)


def nearest_pair(keys: Tensor) -> tuple[int, int, float]:
    """The two keys with the largest cosine between them, in size, and that cosine; (0, 0, 0.0) for fewer than two. keys: [n, f]."""
    if len(keys) < 2:
        return 0, 0, 0.0
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    return _largest_off_diagonal(unit @ unit.T)


def _largest_off_diagonal(cosines: Tensor) -> tuple[int, int, float]:
    size = cosines.abs() - 2 * torch.eye(len(cosines), dtype=cosines.dtype, device=cosines.device)
    first, second = divmod(int(size.argmax()), len(cosines))
    return min(first, second), max(first, second), float(cosines[first, second])


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Of gram + ridge I."""
    factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if int(info):
        raise _not_positive(int(info), len(gram), ridge)
    return factor


# ---- errors


def _name(number: int, names: Sequence[str] | None) -> str:
    return f"'{names[number]}'" if names is not None else f"key {number}"


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "keys or values of an edit are not finite",
        expected="finite numbers",
        found="NaN or infinity",
        remedy="run the model in float32 or bfloat16",
    )


def _no_length(number: int, names: Sequence[str] | None) -> EditError:
    return EditError(
        f"the key of {_name(number, names)} is zero",
        expected="a key with which the MLP tells its subject from others",
        found="a vector of zeros",
        remedy="edit another layer: the neurons of this one are all off at the subject",
    )


def _dependent(cosines: Tensor, names: Sequence[str] | None) -> EditError:
    first, second, cosine = _largest_off_diagonal(cosines)
    return EditError(
        f"{_name(first, names)} and {_name(second, names)} cannot be given values of their own: their keys are not independent",
        expected="keys of which none is a combination of the others",
        found=f"a cosine of {cosine:.4f} between these two",
        remedy="edits of one subject share its key: make them one after the other, or give the editor a ridge (MEMIT has one)",
    )


def _not_positive(order: int, size: int, ridge: float) -> EditError:
    return EditError(
        "the system of an edit cannot be solved",
        expected=f"a positive definite matrix of {size} keys",
        found=f"none from key {order} on, with a ridge of {ridge:g}",
        remedy="give the editor a larger ridge, or leave out facts whose subject is the same",
    )
