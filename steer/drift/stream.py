"""Stream mode: the response tokens of the training batches themselves, read as they pass. Free, but confounded by what the batches hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steer.drift.accumulators import ProjectionMoments, Reduce
from steer.drift.measurement import SiteMeasurement
from steer.drift.site_directions import SiteDirections
from steer.errors import ContextError
from steer.kernels import drift_stats
from steer.model.context import ForwardContext, in_backward
from steer.model.site import Site


class StreamMask:
    """Chooses the tokens of stream mode: labelled, unpadded ones of the policy's training passes.

    Not validation or generation, no pass with the adapters switched off (DPO's and GRPO's reference), and nothing that gradient
    checkpointing computes a second time.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, h: Tensor, context: ForwardContext) -> Tensor | None:
        """[batch, tokens] bool on the device of h; None for a pass that does not count. Raises ContextError."""
        if context.phase != "train" or context.role != "policy" or in_backward():
            return None
        if context.labelled is None:
            raise _response_unknown(self.site)
        mask = (context.labelled if context.attention is True else context.labelled & context.attention).to(h.device)
        return mask.expand(h.shape[:2])


class StreamReader:
    """Reads one site during training; never changes the activation. Which tokens count, `StreamMask` says.

    Attributes:
        window: moments since the last check, of this rank.
        baseline: moments of the first window, over all ranks; None before.
    """

    def __init__(self, directions: SiteDirections) -> None:
        self.directions = directions
        self.mask = StreamMask(directions.site)
        self.window = ProjectionMoments(len(directions.names))
        self.baseline: ProjectionMoments | None = None
        with torch.inference_mode(False):
            self.units = directions.units.float().mT.contiguous().mT  # [directions, width], laid out as the product reads it

    def __call__(self, h: Tensor, context: ForwardContext) -> None:
        """Hook function: adds the response tokens of h [batch, tokens, width] to the window."""
        mask = self.mask(h, context)  # [batch, tokens]
        if mask is None:
            return
        if self.units.device != h.device:  # Lightning moves the model after the attach
            self.move(h.device)
        projections = drift_stats(h, self.units, mask.unsqueeze(-1), channels=False, norms=False).projections
        assert projections is not None
        self.window.update(projections.flatten(0, 1), mask.reshape(-1))  # [batch * tokens, directions], [batch * tokens]

    def move(self, device: torch.device) -> None:
        """Moves everything that the hook touches to a device."""
        with torch.inference_mode(False):
            self.units = self.units.to(device)
        self.window = self.window.to(device)

    def close_window(self, reduce: Reduce) -> SiteMeasurement | None:
        """Measures the window that ends here, over all ranks; None when it has no token. The next window starts empty."""
        window = self.window.reduced(reduce).to("cpu")
        self.window.reset()
        if int(window.n) == 0:
            return None
        if self.baseline is None:
            self.baseline = window
        return SiteMeasurement.of_moments(self.directions, window, self.baseline)

    def state_dict(self, reduce: Reduce) -> dict[str, Tensor]:
        """Window over all ranks, and baseline."""
        window = self.window.reduced(reduce).state_dict()
        state = {f"window/{name}": tensor.cpu() for name, tensor in window.items()}
        if self.baseline is not None:
            state |= {f"baseline/{name}": tensor for name, tensor in self.baseline.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], main: bool) -> None:
        """Takes over a saved state; its window goes to the main rank alone, since it is the sum over all of them."""
        self.window.reset()
        if main:
            self.window.load_state_dict(under("window/", state))
        self.baseline = None
        if baseline := under("baseline/", state):
            self.baseline = ProjectionMoments(len(self.directions.names))
            self.baseline.load_state_dict(baseline)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a flat state whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _response_unknown(site: Site) -> ContextError:
    return ContextError(
        f"the tracker at '{site}' cannot tell the response in this training pass",
        expected="labels, or an announced response mask",
        found="neither of them",
        remedy="pass labels=..., wrap the call in `with steer.response_tokens(model, mask):`, or track with stream=False",
    )
