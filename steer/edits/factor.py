"""Factor: the Cholesky factor of a key covariance, with which edits solve for their updates."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from steer.checks import number_within
from steer.errors import EditError


class Factor:
    """Solves with A = C + ridge * mean(diag C) * I in fp64, C being the covariance E[k k^T] of the keys of one layer.

    Never an inverse: C of some ten thousand tokens has a condition of 1e6 and more.

    Args:
        moment: [f, f] C.
        ridge: share of the mean of its diagonal that is added to it.
        name: of the layer, for the errors.

    Raises:
        EditError: C is zero, or has no Cholesky factor even with the ridge; it names rank and condition. ConfigError: a negative ridge.

    Example:
        >>> factor = covariance.factor(8)
        >>> factor.leverage(read_keys(model, [locate(tokenizer, fact.prompt, fact.subject)], [8])[8])
    """

    def __init__(self, moment: Tensor, ridge: float = 1e-4, name: str = "this layer") -> None:
        number_within(ridge, "the ridge of a covariance", 0.0)
        self.moment = moment.double()
        self.ridge = float(ridge)
        mean = self.moment.diagonal().mean()
        if not bool(mean > 0):
            raise _no_keys(name)
        loaded = self.moment.clone()
        loaded.diagonal().add_(ridge * mean)
        self.lower, failed = torch.linalg.cholesky_ex(loaded)  # [f, f] fp64
        if int(failed):
            raise _singular(name, loaded, self.ridge)

    @property
    def width(self) -> int:
        """Number of neurons, f."""
        return len(self.lower)

    def solve(self, keys: Tensor) -> Tensor:
        """[f, n] fp64: A^-1 K for columns of keys [f, n]."""
        return torch.cholesky_solve(keys.to(self.lower), self.lower)

    def leverage(self, keys: Tensor) -> Tensor:
        """[n] fp64: k^T A^-1 k for rows of keys [n, f]. Over all tokens its mean is f; a large one is a key unlike those of the texts."""
        half = torch.linalg.solve_triangular(self.lower, keys.to(self.lower).mT, upper=False)  # [f, n]
        return half.square().sum(0)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [f] of C itself, ascending, and eigenvectors [f, f] in columns, fp64; worked out once."""
        return self._eigen

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.moment)
        return values, vectors

    def __repr__(self) -> str:
        return f"Factor(width {self.width}, ridge {self.ridge:g})"


# ---- errors


def _no_keys(name: str) -> EditError:
    return EditError(
        f"the covariance of {name} is zero",
        expected="a positive mean on its diagonal",
        found="no keys, or none but zeros",
        remedy="fit it on texts that the model reads: Covariance.fit(model, tokenizer, texts, layers)",
    )


def _singular(name: str, loaded: Tensor, ridge: float) -> EditError:
    values = torch.linalg.eigvalsh(loaded)
    largest = float(values[-1])
    rank = int((values > len(values) * torch.finfo(values.dtype).eps * largest).sum())
    condition = largest / float(values[0]) if float(values[0]) > 0 else float("inf")
    return EditError(
        f"the covariance of {name} cannot be solved with",
        expected=f"rank {len(values)}",
        found=f"rank {rank}, condition {condition:.1e}, ridge {ridge:g}",
        remedy="fit it on more texts, or give factor() a larger ridge",
    )
