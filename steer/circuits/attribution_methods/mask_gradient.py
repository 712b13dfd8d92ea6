"""Gradient by the masks of edges (Miller, Chughtai & Saunders 2024, arXiv 2407.08734): how the target changes as an edge is taken out."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from steer.checks import whole_number
from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values
from steer.circuits.component_pass import Edit
from steer.model.site import Site

NEURONS = "mlp.neurons"  # of an MLP whose mask is that of what it writes


@ATTRIBUTION_METHODS.register("mask_gradient")
class MaskGradient(AttributionMethod):
    """-dM/d mask of each edge, where a mask m lets through (1 - m) of what is written in this pass and m of what takes its place.

    All masks are 0, 1/steps, ..., 1 in as many passes and one more, over which the gradient is averaged. What is written is then not that
    of the clean run: every component computes on what the masks let through to it. With no steps all masks are 0, which is 'eap' exactly.
    Along this way the scores of all nodes add up to M(clean) - M(all ablated), the more exactly the more steps.

    Works with every ablation. Neurons have masks that stay 0 while those of their MLPs move.
    """

    starts_clean = True  # the pass with masks of 0

    def __init__(self, steps: int = 5) -> None:
        whole_number(steps, "the steps of 'mask_gradient'")
        self.steps = steps

    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        for step in range(self.steps + 1):
            written: dict[Site, Tensor] = {}
            edit = _masked(step / max(self.steps, 1), corrupted, written)
            yield GradientPass(1 / (self.steps + 1), edit, start=written)


def _masked(mask: float, corrupted: Values, written: dict[Site, Tensor]) -> Edit:
    """Lets through (1 - mask) of what is written, and its gradient, and keeps what was written."""

    def edit(site: Site, h: Tensor) -> Tensor | None:
        if site not in corrupted:  # of a reader
            return None
        written[site] = h.detach().clone()
        return None if mask == 0 or site.part == NEURONS else h + mask * (corrupted[site].to(h.dtype) - h)

    return edit
