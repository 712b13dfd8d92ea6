"""Logistic regression on pooled activations (a linear probe: Alain and Bengio 2016, arXiv 1610.01644)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import extra, extractor
from steer.directions.moments import ContrastMoments, standardised


@extractor("logistic", needs=("texts",), package="sklearn.linear_model")
def logistic(moments: ContrastMoments) -> Tensor:
    """Weights of a logistic regression with penalty C = 1 on activations of mean square 1."""
    x = standardised(moments.collected().double())
    probe = extra("sklearn.linear_model").LogisticRegression(C=1.0, max_iter=1000)
    probe.fit(x.numpy(), moments.is_positive.numpy())
    return torch.from_numpy(probe.coef_[0].copy())
