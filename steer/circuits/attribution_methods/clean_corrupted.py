"""EAP with gradients at both ends: of the clean prompt and of the corrupted one (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806)."""

from __future__ import annotations

from collections.abc import Iterator

from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values, edit_at
from steer.circuits.attribution_methods.eap_ig import EMBED


@ATTRIBUTION_METHODS.register("clean_corrupted")
class CleanCorrupted(AttributionMethod):
    """Half the gradient in the clean run and half of that in the corrupted one: the trapezoid rule with one step.

    Exact for a target that is quadratic in what is written. Three forward passes and two backward ones.
    """

    starts_clean = True
    needs_pairs = True

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        yield GradientPass(0.5)
        yield GradientPass(0.5, edit_at(EMBED, corrupted[EMBED]))
