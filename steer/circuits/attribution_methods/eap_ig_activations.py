"""EAP with integrated gradients over activations (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806, where inputs are equation 2)."""

from __future__ import annotations

from collections.abc import Iterator

from steer.checks import one_of, whole_number
from steer.circuits.attribution_method import (
    ATTRIBUTION_METHODS,
    PLACES,
    AttributionMethod,
    GradientPass,
    Values,
    edit_at,
    shares_of_way,
)


@ATTRIBUTION_METHODS.register("eap_ig_activations")
class EAPIGActivations(AttributionMethod):
    """The mean gradient while the activations of one component after another go from what takes their place to the clean ones.

    At site s, with a clean activation c and a corrupted one r, component u of s and reader v have the score
    <u(c) - u(r), mean over k of dM/dv where s is r + a_k (c - r)>; everything else is computed anew from the clean prompt. The heads of a
    block go together, as in the reference implementation. No counterfactual prompt is needed, so that zero and mean ablation work. It
    takes steps x (2 blocks + 1) passes with gradients, and as many more as there are blocks with neurons.

    The sum over the components of a site is the change of the target when all of them are ablated, the more exactly the more steps.

    Args:
        steps: of the way. points: where in each step, `left`, `midpoint` or `right`.
    """

    def __init__(self, steps: int = 5, points: str = "midpoint") -> None:
        whole_number(steps, "the steps of 'eap_ig_activations'", least=1)
        self.steps = steps
        self.points = one_of(points, tuple(PLACES), "the points of 'eap_ig_activations'")

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        for site in clean:
            way = clean[site] - corrupted[site]
            for share in shares_of_way(self.steps, self.points):
                yield GradientPass(1 / self.steps, edit_at(site, corrupted[site] + share * way), only=site)
