"""Reading direction of least-squares concept erasure, LEACE (Belrose et al. 2023, arXiv 2306.03819); see `steer.directions.erasure`."""

from __future__ import annotations

from torch import Tensor

from steer.directions.erasure import erasure
from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments


@extractor("leace", needs=("scatter",), package="concept_erasure")
def leace(moments: ContrastMoments) -> Tensor:
    """The direction along which LEACE reads the concept that it erases."""
    return erasure(moments).right[0].double()
