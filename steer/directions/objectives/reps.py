"""Reference-free preference steering, RePS (Wu et al. 2025, arXiv 2505.20809, equations 4 to 6).

Left out: the paper draws the strength of each step from a list and keeps the vector at unit length; here its length is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.directions.trained import Scores, objective
from steer.intervene.operator import Operator, RowTensors, slotted


class AddOrNull(Operator):
    """h + s v for a positive strength s; for a negative one, h without what it has of v, if that is positive: RePS' suppression."""

    name = "add_or_null"
    parts = learnable = ("vector",)

    def __init__(self, vector: Tensor) -> None:
        vector = slotted(vector, 2, "vector")
        super().__init__({"vector": vector}, vector.shape[-1])

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        v = per_row["vector"].unsqueeze(1)
        along = (h.float() * v).sum(-1, keepdim=True).relu() / v.square().sum(-1, keepdim=True)
        return torch.where(strength < 0, -along * v, strength * v).to(h.dtype)


@objective("reps", runs=(("positive", 1), ("negative", 1), ("positive", -1), ("negative", -1)), operator=AddOrNull)
def reps(scores: Scores) -> Tensor:
    """The vector makes the positive answer win by its mean log-probability, and its removal the negative one (RePS).

    A winner that the unsteered model finds unlikely counts for more, by as much as it is behind.
    """
    losses = []
    for sign, winner, loser in ((1, "positive", "negative"), (-1, "negative", "positive")):
        weight = (scores.base[loser] - scores.base[winner]).clamp_min(1)
        won, lost = (scores.steered[side, sign] / scores.tokens[side] for side in (winner, loser))
        losses.append(-logsigmoid(weight * won - lost))
    return torch.stack(losses).sum(0).mean()
