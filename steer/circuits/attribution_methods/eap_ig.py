"""EAP with integrated gradients over the input (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806, equation 2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from steer.checks import one_of, whole_number
from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values
from steer.circuits.component_pass import Edit
from steer.model.site import Site

EMBED = Site("embed")
RULES = {"left": 0.0, "midpoint": 0.5, "right": 1.0}


@ATTRIBUTION_METHODS.register("eap_ig")
class EAPIG(AttributionMethod):
    """The mean gradient over inputs between the corrupted embeddings and the clean ones, which gradients that saturate do not deceive.

    Args:
        steps: of the way.
        points: where in each step: `left` takes the corrupted end and not the clean one, as the reference implementation does; `midpoint`
            neither; `right` the clean one.
    """

    needs_pairs = True

    def __init__(self, steps: int = 5, points: str = "left") -> None:
        whole_number(steps, "the steps of 'eap_ig'", least=1)
        self.steps = steps
        self.points = one_of(points, tuple(RULES), "the points of 'eap_ig'")

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        start, end = corrupted[EMBED], clean[EMBED]
        for step in range(self.steps):
            share = (step + RULES[self.points]) / self.steps
            yield GradientPass(1 / self.steps, _embedding(start + share * (end - start)))


def _embedding(value: Tensor) -> Edit:
    return lambda site, h: value if site == EMBED else None
