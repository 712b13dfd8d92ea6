"""Correctness of an answer, read at its own tokens (Orgad et al. 2024, arXiv 2410.02707); see `LabelledTexts.from_answers` for which."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import extra
from steer.lens.probe import probe


@probe("correctness", target="class")
def correctness(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Logistic regression that gives right and wrong answers the same weight, however many there are of either."""
    fitted = extra("sklearn.linear_model").LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000).fit(x.numpy(), y.numpy())
    return torch.from_numpy(fitted.coef_[0].copy()), float(fitted.intercept_[0])
