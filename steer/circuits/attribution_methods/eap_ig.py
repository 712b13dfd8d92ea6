"""EAP with integrated gradients over the input (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806, equation 2)."""

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
from steer.model.site import Site

EMBED = Site("embed")


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
        self.points = one_of(points, tuple(PLACES), "the points of 'eap_ig'")

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        start, end = corrupted[EMBED], clean[EMBED]
        for share in shares_of_way(self.steps, self.points):
            yield GradientPass(1 / self.steps, edit_at(EMBED, start + share * (end - start)))
