"""The edit of a few features with its gradient in one node: what is kept for it, and done in it, is for the tokens at which they are on.

    y = h + c(h E^T + b) W          dy/dh applied to g:  g + (s * (g W^T)) E          with s = dc/dpre

s [tokens, chosen] is all that is kept. It is 0 at tokens where no chosen feature is on, mostly the great majority: they keep g as it is,
and the two products are made for the others alone. Autograd would make them for all, with a dozen nodes in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.intervene.low_rank import without_autocast

FEW = 4  # where fewer than 1 / FEW of all tokens have a slope, it is faster to pick them out


class EditFeatures(torch.autograd.Function):
    """h + change @ decoder, [tokens, width], with the gradient that h has through `change` too; differentiable as often as one likes.

    change, slope: [tokens, chosen], of the pre-activations h @ rows.T, on which the slope does not depend: it is constant between jumps.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, change: Tensor, slope: Tensor, rows: Tensor, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(slope, rows, decoder)
        return torch.addmm(h, change, decoder)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        slope, rows, decoder = ctx.saved_tensors
        with without_autocast(g):
            if g.device.type == "cpu":  # elsewhere the host would have to wait for the number of tokens
                on = slope.any(1).nonzero()[:, 0]
                if len(on) * FEW < len(g):
                    of_pre = (decoder @ g[on].mT).mT * slope[on]  # [tokens that are on, chosen]
                    return g.index_add(0, on, of_pre @ rows), None, None, None, None
            return torch.addmm(g, (decoder @ g.mT).mT * slope, rows), None, None, None, None


def pre_activations(h: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """h rows^T + bias, [tokens, chosen], made as its transpose: the long side of the product is contiguous then."""
    return (rows @ h.mT if bias is None else torch.addmm(bias[:, None], rows, h.mT)).mT
