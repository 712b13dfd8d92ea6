"""Linear discriminant: the gap of the class means, whitened by the covariance within classes.

The same vector is the mass-mean probe for independent and identically distributed texts (Marks and Tegmark 2023, arXiv 2310.06824,
section 5.2); `mass_mean` is another name of it. The probe without the covariance is `mean_difference`.
"""

from __future__ import annotations

from torch import Tensor

from steer.directions.extractor import EXTRACTORS, extractor
from steer.directions.moments import ContrastMoments
from steer.directions.scatter import Scatter


@extractor("lda", needs=("scatter",))
def lda(moments: ContrastMoments) -> Tensor:
    """Linear discriminant (mass-mean probe): class gap whitened by the shrunk covariance within classes."""
    within = moments.within
    share, scale = shrinkage(within, moments.n)
    # classes that do not vary at all leave rounding errors of the sums, which must not be inverted
    ridge = share * scale + 1e-10 * moments.total.trace / moments.n
    return within.solve(moments.gap, scale=(1 - share) / moments.n, ridge=ridge)


EXTRACTORS.alias("mass_mean", "lda")


def shrinkage(scatter: Scatter, n: int) -> tuple[float, Tensor]:
    """How far a covariance moves towards a multiple of the identity, and that multiple: the oracle approximating amount (Chen et al. 2010,
    arXiv 0907.4698, equation 23, without the terms in 2 / width, as scikit-learn has it). The shrunk covariance is
    (1 - share) * covariance + share * scale * I, which is not singular, however few texts there are.

    Args:
        scatter: n times the covariance of n texts.

    Returns:
        share, scale.
    """
    width = scatter.width
    scale = scatter.trace / n / width
    power = scatter.squared_norm / n**2 / width**2  # mean square of the covariance's entries
    spread = (n + 1) * (power - scale**2 / width)
    share = float(((power + scale**2) / spread).clamp(max=1)) if float(spread) > 0 else 1.0
    return share, scale
