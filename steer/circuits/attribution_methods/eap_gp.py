"""EAP with a path chosen by gradients, EAP-GP (Zhang et al. 2025, arXiv 2502.06852; the path is that of IG2, arXiv 2406.10852)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from steer.checks import whole_number
from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values, edit_at
from steer.circuits.attribution_methods.eap_ig import EMBED
from steer.circuits.component_pass import Record


@ATTRIBUTION_METHODS.register("eap_gp")
class EAPGP(AttributionMethod):
    """The mean gradient over inputs on a path that starts at the clean embeddings and goes where the target moves, not straight.

    With the target M, the clean embeddings x and the corrupted ones x', the path is x_0 = x,
    x_{j+1} = x_j - (|x - x'| / steps) * d_j / |d_j|, where d_j is the gradient of (M(x_j) - M(x'))^2 by x_j, and norms are over the tokens
    of a prompt. Differences of activations are those between the two prompts. So the gradient is taken where the target responds, and not
    on a straight way that may lie where it is saturated. The paper compares representations of the model instead of the target.

    Takes steps + 1 passes with gradients: one more than 'eap_ig', for M(x').

    Args:
        steps: of the path, which is as long as the straight way.
    """

    needs_pairs = True

    def __init__(self, steps: int = 5) -> None:
        whole_number(steps, "the steps of 'eap_gp'", least=1)
        self.steps = steps

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        end, at_end, here = corrupted[EMBED], Record(), Record()
        yield GradientPass(0.0, edit_at(EMBED, end), into=at_end)
        point = clean[EMBED]
        length = _norm(point - end) / self.steps
        for _ in range(self.steps):
            yield GradientPass(1 / self.steps, edit_at(EMBED, point), into=here)
            gradient = here.gradients[EMBED].float()
            towards_end = (here.target - at_end.target).sign().to(gradient.device)[:, None, None]  # [rows, 1, 1]
            step = length * towards_end * gradient / _norm(gradient).clamp_min(torch.finfo(torch.float32).tiny)
            point = point - step.to(point.dtype)


def _norm(h: Tensor) -> Tensor:
    """[rows, 1, 1] over the tokens of each prompt."""
    return h.float().square().sum((1, 2), keepdim=True).sqrt()
