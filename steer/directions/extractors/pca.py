"""First principal directions of pair differences (Zou et al. 2023, arXiv 2310.01405, section 3.1) and of the texts."""

from __future__ import annotations

from torch import Tensor

from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments
from steer.directions.scatter import Scatter


@extractor("pca", needs=("differences",))
def pca(moments: ContrastMoments) -> Tensor:
    """First principal direction of the pair differences about zero, or of unpaired texts about their mean.

    The differences are not centred: that would remove their mean, which is what the pairs have in common. Centring each pair on its
    midpoint instead gives the same direction.
    """
    return _first(moments.of_pairs() if moments.paired else moments.total)


@extractor("pca_centred", needs=("scatter",))
def pca_centred(moments: ContrastMoments) -> Tensor:
    """First principal direction of all texts about their common mean, whichever class they belong to."""
    return _first(moments.total)


def _first(scatter: Scatter) -> Tensor:
    _, vectors = scatter.eigen
    return vectors[0]
