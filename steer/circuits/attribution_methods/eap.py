"""Edge attribution patching, EAP (Syed, Rager & Conmy 2023, arXiv 2310.10348), and attribution patching of nodes (Nanda 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values


@ATTRIBUTION_METHODS.register("eap")
class EAP(AttributionMethod):
    """The gradient at the clean run alone: two forward passes and a backward one."""

    starts_clean = True

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        yield GradientPass()
