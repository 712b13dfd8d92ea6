"""Gradient interaction modifications, GIM (Edin et al. 2025, arXiv 2505.17630): gradients that self-repair of attention hides less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steer.circuits.attention_backward import Attended, attention_as
from steer.circuits.backward_rule import BACKWARD_RULES, BackwardRule
from steer.circuits.gated_products import halved_products
from steer.circuits.linear import all_norms_of, constant_denominators
from steer.model.anatomy import Anatomy

TEMPERATURE = 2.0
QUERY, KEY, VALUE = 0.25, 0.25, 0.5  # parts of the gradient; those of a product of n tensors add up to 1


@BACKWARD_RULES.register("gim")
class GIM(BackwardRule):
    """Statistics of norms are constants, softmax has the derivative that it has at temperature 2, products share their gradient out.

    In attention queries and keys, which are multiplied with each other and then with values, get a quarter of the gradient each, and
    values half of it. The two factors of a gated MLP get half each.
    """

    constant_denominators = True

    @contextmanager
    def applied(self, anatomy: Anatomy) -> Iterator[None]:
        with constant_denominators(all_norms_of(anatomy)), attention_as(anatomy, _attended), halved_products(anatomy, rule="gim"):
            yield


def _attended(attended: Attended) -> Tensor:
    """[rows, heads, tokens, head_dim]."""
    query, key, value = (_with_gradient(h, part) for h, part in ((attended.query, QUERY), (attended.key, KEY), (attended.value, VALUE)))
    scores = attended.scores(query, key).float()
    pattern = scores.detach().softmax(-1)
    if scores.requires_grad:
        warm = (scores / TEMPERATURE).softmax(-1)
        # d softmax(x / T) / dx has a factor 1 / T, which the rule leaves out
        pattern = pattern + TEMPERATURE * (warm - warm.detach())
    return attended.mixed(pattern, value)


def _with_gradient(h: Tensor, part: float) -> Tensor:
    """The same values with a part of the gradient."""
    return h.detach() + part * (h - h.detach()) if torch.is_grad_enabled() else h
