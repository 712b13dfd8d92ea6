"""Least-squares concept erasure, LEACE (Belrose et al. 2023, arXiv 2306.03819), with the authors' package `concept-erasure`.

The eraser x - left^T right (x - mean) removes everything that a linear probe could read of the concept, at the least change of x. For
one contrast it has rank one: it reads along `right`, the discriminant of the total covariance, and removes along `left`, the gap of the
class means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.directions.contrast import ContrastSet
from steer.directions.extract import read_moments
from steer.directions.extractor import extra
from steer.directions.moments import ContrastMoments
from steer.directions.scatter import Scatter
from steer.errors import ContrastError
from steer.model.anatomy import Anatomy
from steer.model.site import Site


@dataclass(frozen=True, eq=False)
class Erasure:
    """Tensors of an eraser, as the operator `erase` takes them: h - (h - mean) right^T left.

    Attributes:
        left, right: [rank, width] fp32.
        mean: [width] fp32, what an erased activation has along the concept.

    Example:
        >>> (eraser,) = steer.fit_erasure(model, contrast, ["layers.12.output"]).values()
        >>> operator = steer.Erase(eraser.left, eraser.right, eraser.mean)
    """

    left: Tensor
    right: Tensor
    mean: Tensor

    def __repr__(self) -> str:
        return f"Erasure(rank {self.left.shape[0]}, width {self.left.shape[1]})"

    def __call__(self, x: Tensor) -> Tensor:
        """Erased activations, [..., width]."""
        return x - (x - self.mean) @ self.right.mT @ self.left


def erasure(moments: ContrastMoments) -> Erasure:
    """The eraser of one site.

    Args:
        moments: with `scatter`.

    Raises:
        ContrastError: the concept is too weak here to be erased (a correlation below 0.02).
        ConfigError: the package is missing.
    """
    left, right = _projections(moments)
    if not float(left.norm() * right.norm()):
        raise _nothing_error(moments)
    return Erasure(left.float().contiguous(), right.float().contiguous(), moments.mean.float())


def _projections(moments: ContrastMoments) -> tuple[Tensor, Tensor]:
    """`left` and `right` of an eraser, [1, width] fp64, zero where there is nothing to erase.

    The package's own fit solves in [width, width]. Its covariance has few eigenvalues apart from what shrinkage adds to all of them, and
    the gap lies among their eigenvectors, so the fit is done there: in k dimensions, with the covariance that the whole would have.
    """
    n = moments.n
    positive = moments.positive.n
    total = moments.total
    # statistics that its update() would have gathered from the texts, the concept being 1 on positive ones and 0 on the others
    sigma_xz = moments.gap * positive * (n - positive) / n  # [width]
    fitter_of = extra("concept_erasure").LeaceFitter
    if total.rows is None:
        eraser = _fitted(fitter_of(total.width, 1, dtype=torch.float64), n, positive, total.matrix, sigma_xz).eraser
        return eraser.proj_left.mT, eraser.proj_right
    values, vectors = total.eigen  # [k], [k, width]
    scale, ridge = shrunk_spectrum(total, n)
    fitter = fitter_of(len(values), 1, dtype=torch.float64, shrinkage=False)
    shrunk = scale * values / n + ridge  # [k], eigenvalues of the shrunk covariance
    # without shrinkage the package divides by n - 1
    eraser = _fitted(fitter, n, positive, torch.diag(shrunk * (n - 1)), vectors @ sigma_xz).eraser
    return eraser.proj_left.mT @ vectors, eraser.proj_right @ vectors


def _fitted(fitter: Any, n: int, positive: int, sigma_xx: Tensor, sigma_xz: Tensor) -> Any:
    """The package's fitter with its statistics. sigma_xx: [k, k] and sigma_xz: [k], sums over all texts."""
    fitter.n = torch.tensor(n)
    fitter.mean_z = torch.tensor([positive / n], dtype=torch.float64)
    fitter.sigma_xx_ = sigma_xx
    fitter.sigma_xz_ = sigma_xz[:, None]
    return fitter


def shrunk_spectrum(total: Scatter, n: int) -> tuple[Tensor, Tensor]:
    """Optimal linear shrinkage of a covariance (Bodnar, Gupta and Parolya 2014, arXiv 1308.2608), as `concept_erasure` has it, from its
    trace and norm alone: the shrunk covariance is scale * covariance + ridge * I.

    Args:
        total: n times the covariance.

    Returns:
        scale, ridge.
    """
    width = total.width
    trace = total.trace / n
    target = trace**2 / width  # squared norm of the multiple of the identity with this trace
    along = trace**2 / width  # of the covariance with it
    eps = torch.finfo(torch.float64).eps
    scale = 1 - (trace**2 * target / n + eps) / (total.squared_norm / n**2 * target - along**2 + eps)
    return scale, (1 - scale) * (along + eps) / (target + eps) * trace / width


def fit_erasure(
    model: nn.Module, contrast: ContrastSet, sites: Sequence[str | Site], *, span: str | int = "response", progress: bool = True
) -> dict[Site, Erasure]:
    """Erasers of a concept at every site, from one pass over all texts of the contrast.

    Args:
        model: a decoder, raw or wrapped.
        contrast: the texts; hold some out yourself to see what is left of the concept on others.
        sites: sites or patterns such as `layers.*.output`.
        span: which tokens of a text are averaged, see `extract`.

    Raises:
        ContrastError, ConfigError, SiteError, NonFiniteError.

    Example:
        >>> erasers = steer.fit_erasure(model, contrast, ["layers.12.output"])
        >>> plan = steer.Plan([steer.Intervention(steer.Erase(e.left, e.right, e.mean), site) for site, e in erasers.items()])
    """
    extra("concept_erasure")
    chosen = Anatomy.find(model).sites(*map(str, sites))
    return {site: erasure(moments) for site, moments in read_moments(model, contrast, chosen, span, {"scatter"}, progress).items()}


def _nothing_error(moments: ContrastMoments) -> ContrastError:
    return ContrastError(
        "there is nothing to erase",
        expected="classes that a linear probe can tell apart",
        found=f"a gap of {float(moments.gap.norm()):.3g} beside activations of length {moments.activation_norm:.3g}",
        remedy="use another site or span, or texts that differ there",
    )
