"""Difference of the class means (Marks and Tegmark 2023, arXiv 2310.06824, section 5).

CAA (Rimsky et al. 2023, arXiv 2312.06681) takes the mean of the differences of pairs, which is the difference of the means: `caa` is
another name of this extractor, not another extractor.
"""

from __future__ import annotations

from torch import Tensor

from steer.directions.extractor import EXTRACTORS, extractor
from steer.directions.moments import ContrastMoments


@extractor("mean_difference")
def mean_difference(moments: ContrastMoments) -> Tensor:
    """Difference of the class means; for pairs the same as CAA."""
    return moments.gap


EXTRACTORS.alias("caa", "mean_difference")
