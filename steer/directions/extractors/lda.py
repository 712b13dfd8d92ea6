"""Linear discriminant: the gap of the class means, whitened by the covariance within classes.

The same vector is the mass-mean probe for independent and identically distributed texts (Marks and Tegmark 2023, arXiv 2310.06824,
section 5.2); `mass_mean` is another name of it. The probe without the covariance is `mean_difference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import EXTRACTORS, extractor
from steer.directions.moments import ContrastMoments


@extractor("lda", needs=("scatter",))
def lda(moments: ContrastMoments) -> Tensor:
    """Linear discriminant (mass-mean probe): class gap whitened by the shrunk covariance within classes."""
    covariance = shrunk(moments.within / moments.n, moments.n)
    # classes that do not vary at all leave rounding errors of the sums, which must not be inverted
    covariance.diagonal().add_(1e-10 * moments.total.trace() / moments.n)
    return torch.linalg.solve(covariance, moments.gap)


EXTRACTORS.alias("mass_mean", "lda")


def shrunk(covariance: Tensor, n: int) -> Tensor:
    """The covariance moved towards a multiple of the identity by the oracle approximating amount (Chen et al. 2010, arXiv 0907.4698,
    equation 23, without the terms in 2 / width, as scikit-learn has it). It needs no more than the covariance, so moments are enough.

    Args:
        covariance: [width, width], of n texts; singular when there are fewer texts than dimensions, which the result is not.
    """
    width = covariance.shape[0]
    scale = covariance.trace() / width
    power = covariance.square().mean()
    spread = (n + 1) * (power - scale**2 / width)
    share = float(((power + scale**2) / spread).clamp(max=1)) if float(spread) > 0 else 1.0
    return (1 - share) * covariance + share * scale * torch.eye(width, dtype=covariance.dtype)
