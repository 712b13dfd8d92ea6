"""Difference of the class means (Marks and Tegmark 2023, arXiv 2310.06824; for pairs the same as CAA, arXiv 2312.06681)."""

from __future__ import annotations

from torch import Tensor

from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments


@extractor("mean_difference")
def mean_difference(moments: ContrastMoments) -> Tensor:
    """Difference of the class means."""
    return moments.gap
