"""Least-squares concept erasure, LEACE (Belrose et al. 2023, arXiv 2306.03819), with the authors' package `concept-erasure`.

The eraser x - left^T right (x - mean) removes everything that a linear probe could read of the concept, at the least change of x. For
one contrast it has rank one: it reads along `right`, the discriminant of the total covariance, and removes along `left`, the gap of the
class means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.directions.contrast import ContrastSet
from steer.directions.extract import read_moments
from steer.directions.extractor import extra
from steer.directions.moments import ContrastMoments
from steer.errors import ContrastError
from steer.model.anatomy import Anatomy
from steer.model.site import Site


@dataclass(frozen=True, eq=False)
class Erasure:
    """Tensors of an eraser, as the operator `erase` takes them: h - (h - mean) right^T left.

    Attributes:
        left, right: [rank, width] fp32.
        mean: [width] fp32, what an erased activation has along the concept.
    """

    left: Tensor
    right: Tensor
    mean: Tensor

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
    width, positive, n = moments.gap.shape[0], moments.positive.n, moments.n
    fitter = extra("concept_erasure").LeaceFitter(width, 1, dtype=torch.float64)
    # the statistics that its update() would have gathered from the texts, the concept being 1 on positive ones and 0 on the others
    fitter.n = torch.tensor(n)
    fitter.mean_x, fitter.mean_z = moments.mean, torch.tensor([positive / n], dtype=torch.float64)
    fitter.sigma_xx_ = moments.total
    fitter.sigma_xz_ = (moments.gap * positive * (n - positive) / n)[:, None]
    eraser = fitter.eraser
    left, right = eraser.proj_left.mT, eraser.proj_right
    if not float(left.norm() * right.norm()):
        raise ContrastError(
            "there is nothing to erase",
            expected="classes that a linear probe can tell apart",
            found=f"a gap of {float(moments.gap.norm()):.3g} beside activations of length {moments.activation_norm:.3g}",
            remedy="use another site or span, or texts that differ there",
        )
    return Erasure(left.float().contiguous(), right.float().contiguous(), moments.mean.float())


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
    """
    extra("concept_erasure")
    chosen = Anatomy.find(model).sites(*map(str, sites))
    return {site: erasure(one) for site, one in read_moments(model, contrast, chosen, span, {"scatter"}, progress).items()}
