"""Scatter matrices in the span of the texts: what extractors solve with, in megabytes where a [width, width] matrix would take gigabytes.

With fewer texts than dimensions a scatter matrix has few eigenvectors of an eigenvalue above 0, all of them combinations of the texts. The
singular vectors of the texts are these eigenvectors; in every other direction the matrix is zero, or what a ridge makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(eq=False)
class Scatter:
    """Sum of x x^T over vectors x, kept as these vectors or as the matrix.

    Args:
        rows: [n, width] fp64, the vectors; None where the matrix is kept.
        dense: [width, width] fp64, the matrix; None where the vectors are.

    Example:
        >>> scatter = Scatter(rows=torch.eye(2, 5, dtype=torch.float64))
        >>> float(scatter.trace)
        2.0
    """

    rows: Tensor | None = None
    dense: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of dimensions."""
        return self._stored.shape[-1]

    @property
    def _stored(self) -> Tensor:
        stored = self.rows if self.dense is None else self.dense
        assert stored is not None
        return stored

    @cached_property
    def matrix(self) -> Tensor:
        """[width, width] fp64."""
        if self.dense is not None:
            return self.dense
        assert self.rows is not None
        return self.rows.mT @ self.rows

    @property
    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        return self._stored.trace() if self.rows is None else self.rows.square().sum()

    @property
    def squared_norm(self) -> Tensor:
        """Sum of the squares of all entries, which is that of the eigenvalues."""
        if self.rows is None:
            return self._stored.square().sum()
        return (self.rows @ self.rows.mT).square().sum()  # of the [n, n] Gram matrix, which has the same eigenvalues

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """[k] eigenvalues, the largest first, and [k, width] eigenvectors: all of them, or those in the span of the vectors."""
        if self.rows is None:
            values, vectors = torch.linalg.eigh(self._stored)
            return values.flip(0), vectors.mT.flip(0)
        _, singular, vectors = torch.linalg.svd(self.rows, full_matrices=False)  # [k], [k, width]
        return singular.square(), vectors

    def solve(self, vector: Tensor, *, scale: Tensor | float, ridge: Tensor | float) -> Tensor:
        """(scale * self + ridge * I)^-1 vector. vector: [width] fp64."""
        if self.rows is None:
            ridged = scale * self._stored
            ridged.diagonal().add_(ridge)
            return torch.linalg.solve(ridged, vector)
        values, vectors = self.eigen
        inside = vectors @ vector  # [k], along the eigenvectors
        outside = vector - inside @ vectors  # [width], where nothing but the ridge is
        return (inside / (scale * values + ridge)) @ vectors + outside / ridge
