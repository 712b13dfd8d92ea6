"""First principal direction (Zou et al. 2023, arXiv 2310.01405)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments


@extractor("pca", second=True)
def pca(moments: ContrastMoments) -> Tensor:
    """First principal direction: of the pair differences about zero, or of both sets about their common mean."""
    spread = moments.spread
    assert spread.second is not None
    scatter = spread.second if moments.paired else spread.second - torch.outer(spread.first, spread.first) / spread.n
    return torch.linalg.eigh(scatter).eigenvectors[:, -1]
