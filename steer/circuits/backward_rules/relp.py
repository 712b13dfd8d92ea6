"""Relevance patching, RelP (Rezaei Jafari et al. 2025, arXiv 2508.21258): coefficients of layer-wise relevance propagation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from steer.circuits.backward_rule import BACKWARD_RULES, BackwardRule
from steer.circuits.gated_products import halved_products
from steer.circuits.linear import all_norms_of, constant_denominators
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.hook_registration import AFTER_EDITS
from steer.model.restoring import restoring


@BACKWARD_RULES.register("relp")
class RelP(BackwardRule):
    """Denominators of norms and attention patterns are constants, act(x) is x times a constant, a product's factors get half each.

    Queries and keys have no gradient then, so that edges into them have score 0.
    """

    constant_denominators = True

    @contextmanager
    def applied(self, anatomy: Anatomy) -> Iterator[None]:
        points = [(anatomy.point(site), _Detached()) for site in anatomy.sites("layers.*.attn.q", "layers.*.attn.k")]
        installation = hooks.Installation(anatomy.model, anatomy, points)
        products = halved_products(anatomy, rule="relp", constant_ratios=True)
        with constant_denominators(all_norms_of(anatomy)), products, restoring(installation.remove):
            installation.install()
            yield


class _Detached:
    """A constant from here on, for those after whoever asks for the gradient here."""

    order = AFTER_EDITS

    def __call__(self, h: Tensor, ctx: Any) -> Tensor:
        return h.detach()
