"""First principal direction (Zou et al. 2023, arXiv 2310.01405)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments


@extractor("pca", second=True)
def pca(moments: ContrastMoments) -> Tensor:
    """First principal direction: of the pair differences about zero, or of both sets about their common mean."""
    if moments.paired:
        scatter = moments.difference.second
    else:
        p, q = moments.positive, moments.negative
        assert p is not None and p.second is not None and q.second is not None
        total, n = p.first + q.first, p.n + q.n
        scatter = p.second + q.second - torch.outer(total, total) / n
    assert scatter is not None
    return torch.linalg.eigh(scatter).eigenvectors[:, -1]
