"""Ridge regression on activations, for labels that are numbers: latitude, longitude, year (Gurnee and Tegmark 2023, arXiv 2310.02207)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steer.directions.extractor import extra
from steer.lens.probe import probe

PENALTIES = np.logspace(-2, 4, 13)  # on activations of mean square 1


@probe("ridge", target="number")
def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Ridge regression of a number, the penalty chosen among the texts it is fitted on by leaving one out."""
    fitted = extra("sklearn.linear_model").RidgeCV(alphas=PENALTIES).fit(x.numpy(), y.numpy())
    return torch.from_numpy(fitted.coef_.copy()), float(fitted.intercept_)
