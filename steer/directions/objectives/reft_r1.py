"""Rank-1 representation finetuning, ReFT-r1 (Wu et al. 2025, AxBench, arXiv 2501.17148, section 4).

One vector of length 1 detects the concept and steers by what it detects. The direction is that vector times its largest detection on the
texts, which is how the paper steers with it. Left out: the paper's penalty on what is detected beyond the k largest.
"""

from __future__ import annotations

from torch import Tensor

from steer.directions.trained import Scores, objective
from steer.intervene.operators.reft_r1 import ReftR1


@objective("reft_r1", runs=(("positive", 1),), operator=ReftR1, detects=True)
def reft_r1(scores: Scores) -> Tensor:
    """The vector makes the positive answers likely, by as much as it detects of the concept (ReFT-r1)."""
    return -(scores.steered["positive", 1] / scores.tokens["positive"]).mean()
