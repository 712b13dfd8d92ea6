"""Stream mode: the response tokens of the training batches themselves, read as they pass. Free, but confounded by what the batches hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steer.drift.accumulators import ProjectionMoments, Reduce
from steer.drift.metrics import standardise, z_controls
from steer.drift.probe import records
from steer.drift.records import DriftRecord
from steer.drift.watch import Watch
from steer.errors import ContextError
from steer.kernels import drift_stats
from steer.model.context import ForwardContext, in_backward


class StreamReader:
    """Reads one site during training; never changes the activation.

    Counted are labelled, unpadded tokens of the policy's training passes: no validation or generation, no pass with the adapters switched
    off (DPO's and GRPO's reference), and nothing that gradient checkpointing computes a second time.

    Attributes:
        window: moments since the last check, of this rank.
        baseline: moments of the first window, over all ranks; None before.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.window = ProjectionMoments(len(watch.names))
        self.baseline: ProjectionMoments | None = None
        with torch.inference_mode(False):
            self.units = watch.units.float().mT.contiguous().mT  # as the product wants it

    def __call__(self, h: Tensor, ctx: ForwardContext) -> None:
        if ctx.phase != "train" or ctx.role != "policy" or in_backward():
            return
        if ctx.labelled is None:
            raise ContextError(
                f"the tracker at '{self.watch.site}' cannot tell the response in this training pass",
                expected="labels, or an announced response mask",
                found="neither of them",
                remedy="pass labels=..., wrap the call in `with steer.response_tokens(model, mask):`, or track with stream=False",
            )
        mask = (ctx.labelled if ctx.attention is True else ctx.labelled & ctx.attention).to(h.device)
        if self.units.device != h.device:  # Lightning moves the model after the attach
            self.move(h.device)
        mask = mask.expand(h.shape[:2])
        found = drift_stats(h, self.units, mask.unsqueeze(-1), channels=False, norms=False)
        assert found.projections is not None
        self.window.update(found.projections.flatten(0, 1), mask.reshape(-1))

    def move(self, device: torch.device) -> None:
        """Puts everything that the hook touches on a device."""
        with torch.inference_mode(False):
            self.units = self.units.to(device)
        self.window = self.window.to(device)

    def close_window(self, step: int, reduce: Reduce) -> list[DriftRecord]:
        """Records of the window that ends here, over all ranks; none when it has no token. The next window starts empty."""
        window = self.window.reduced(reduce).to("cpu")
        self.window.reset()
        n = int(window.n)
        if n == 0:
            return []
        if self.baseline is None:
            self.baseline = window
        change = window.mean - self.baseline.mean
        effect, k = standardise(change, self.baseline.sd), self.watch.named
        tests = {"z_controls": z_controls(effect[:k], effect[k:])}
        return records(self.watch, "stream", step, n, window.mean, window.sd, change, effect, tests)

    def state_dict(self, reduce: Reduce) -> dict[str, Tensor]:
        """Window over all ranks, and baseline."""
        window = self.window.reduced(reduce).state_dict()
        state = {f"window/{name}": tensor.cpu() for name, tensor in window.items()}
        if self.baseline is not None:
            state |= {f"baseline/{name}": tensor for name, tensor in self.baseline.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], main: bool) -> None:
        """The window goes to the main rank alone, since it is the sum over all of them."""
        self.window.reset()
        if main:
            self.window.load_state_dict(under("window/", state))
        self.baseline = None
        if first := under("baseline/", state):
            self.baseline = ProjectionMoments(len(self.watch.names))
            self.baseline.load_state_dict(first)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a flat state whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
