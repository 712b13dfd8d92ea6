"""Bi-directional preference optimisation, BiPO (Cao et al. 2024, arXiv 2406.00045, equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.directions.trained import Scores, objective

BETA = 0.1  # of the paper


@objective("bipo", runs=(("positive", 1), ("negative", 1), ("positive", -1), ("negative", -1)))
def bipo(scores: Scores) -> Tensor:
    """The vector makes the positive answer win over the negative one, and its opposite the other way round (BiPO).

    A DPO loss against the unsteered model for each sign. The paper draws one sign a step; here both are taken, which is its mean.
    """
    losses = []
    for sign in (1, -1):
        gained = {side: scores.steered[side, sign] - scores.base[side] for side in ("positive", "negative")}
        losses.append(-logsigmoid(sign * BETA * (gained["positive"] - gained["negative"])))
    return torch.stack(losses).mean()
