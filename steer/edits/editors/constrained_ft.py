"""FT-L: constrained fine-tuning, a baseline of editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steer.checks import finite_number, number_within, whole_number
from steer.edits.edit import WeightDelta
from steer.edits.editor import EDITORS, EditBench, Editor, Solution
from steer.edits.fact import Fact
from steer.edits.fine_tune import Shift, fine_tune, not_said
from steer.model.devices import input_device

_SHARE = 0.02  # of the root mean square of a weight


@EDITORS.register("constrained_ft")
@dataclass(frozen=True)
class ConstrainedFT(Editor):
    """Fine-tuning of one down projection whose numbers may each move by a little: W0 - epsilon <= W <= W0 + epsilon (FT-L).

    Zhu et al. 2020, "Modifying Memories in Transformer Models", arXiv 2012.00363, as a baseline of Meng et al. 2022, arXiv 2202.05262,
    appendix E.1. The change has full rank, so that its edit is as large as the matrix.

    Attributes:
        epsilon: None for 0.02 times the root mean square of the weight. Published: 5e-4 for GPT-2 XL, 5e-5 for GPT-J.
        lr: of Adam. steps: at most.
        stop_loss: it ends below, nat per token.
    """

    needs_covariance = False

    epsilon: float | None = None
    lr: float = 5e-4
    steps: int = 25
    stop_loss: float = 0.01

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            finite_number(self.epsilon, "epsilon of a constrained fine-tuning", above=0)
        check_training(self.lr, self.steps, self.stop_loss)

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        wanted, no_op = not_said(bench, facts)
        if not wanted:
            return Solution(tuple(bench.no_delta(layer) for layer in bench.layers), no_op=no_op)
        changes = {
            layer: torch.zeros(edited.out_width, edited.in_width, device=input_device(edited.module), requires_grad=True)
            for layer, edited in bench.maps.items()
        }
        limits = {layer: self._limit(bench, layer) for layer in changes}

        def clamp() -> None:
            with torch.no_grad():
                for layer, change in changes.items():
                    change.clamp_(-limits[layer], limits[layer])

        shifts = {layer: Shift(partial(_times, change), (change,)) for layer, change in changes.items()}
        fine_tune(bench, wanted, shifts, lr=self.lr, steps=self.steps, stop_loss=self.stop_loss, after_step=clamp)
        deltas = [WeightDelta.of_change(bench.maps[layer].name, layer, change.detach().cpu()) for layer, change in changes.items()]
        return Solution(tuple(deltas), no_op=no_op)

    def _limit(self, bench: EditBench, layer: int) -> float:
        return _SHARE * float(bench.maps[layer].weight().square().mean().sqrt()) if self.epsilon is None else self.epsilon


def _times(change: Tensor, x: Tensor) -> Tensor:
    return x @ change.mT


def check_training(lr: float, steps: int, stop_loss: float) -> None:
    """Raises ConfigError for settings out of range."""
    finite_number(lr, "the learning rate of an editor", above=0)
    whole_number(steps, "the steps of an editor", least=1)
    number_within(stop_loss, "stop_loss of an editor", 0)
