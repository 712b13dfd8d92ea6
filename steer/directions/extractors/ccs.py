"""Contrast-consistent search, CCS (Burns et al. 2022, arXiv 2212.03827, section 2.2): a probe that finds a concept without being told
which text of a pair has it.

It looks for a linear probe that calls one text of each pair positive and the other negative, and is sure of it. In the paper the two
texts end in "yes" and "no", and each ending is centred by itself, lest the probe read the ending. Here the sides of a pair are the
concept, so all texts are centred together and the order within a pair hides which one is positive; the labels only give the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.directions.extractor import extractor
from steer.directions.moments import ContrastMoments, standardised

TRIES, STEPS, RATE = 10, 500, 0.01  # the paper has 10 tries of 1000 epochs with AdamW at 0.01


@extractor("ccs", needs=("texts",), pairs=True)
def ccs(moments: ContrastMoments) -> Tensor:
    """Contrast-consistent search: an unsupervised probe that splits every pair with confidence."""
    x = standardised(moments.collected())
    pairs = x.view(-1, 2, x.shape[1])
    generator = torch.Generator().manual_seed(0)
    turned = torch.rand(len(pairs), generator=generator) < 0.5
    first, second = torch.where(turned[:, None, None], pairs.flip(1), pairs).unbind(1)
    probes = torch.randn(TRIES, x.shape[1], generator=generator)
    with torch.enable_grad():  # a caller may have switched gradients off
        weight = (probes / probes.norm(dim=-1, keepdim=True)).requires_grad_()
        bias = torch.zeros(TRIES, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses = consistency((first @ weight.mT + bias).sigmoid(), (second @ weight.mT + bias).sigmoid())
            losses.sum().backward()  # the tries do not touch one another
            optimizer.step()
    return weight.detach()[losses.argmin()].double()


def consistency(p: Tensor, q: Tensor) -> Tensor:
    """The two probabilities of a pair should add up to one, and not be both a half (equation 2).

    Args:
        p, q: [pairs, tries], of the two texts of each pair.

    Returns:
        [tries], mean loss over pairs.
    """
    return ((p - (1 - q)).square() + torch.minimum(p, q).square()).mean(0)
