"""LoRA on the facts alone, a baseline of editing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steer.checks import finite_number, whole_number
from steer.edits.edit import WeightDelta
from steer.edits.editor import EDITORS, EditBench, Editor, Solution
from steer.edits.editors.constrained_ft import check_training
from steer.edits.fact import Fact
from steer.edits.fine_tune import Shift, fine_tune, not_said
from steer.model.devices import input_device


@EDITORS.register("lora")
@dataclass(frozen=True)
class LoRA(Editor):
    """An adapter of the down projections, trained on the facts alone: W + alpha / rank B A.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, trained on the target tokens behind the plain
    prompts. Nothing holds it to anything else.

    Attributes:
        rank, alpha: of the adapter, whose factor is alpha / rank.
        lr: of Adam. steps: at most.
        stop_loss: it ends below, nat per token.
        seed: of A; B starts at zero.
    """

    needs_covariance = False

    rank: int = 8
    alpha: float = 32.0
    lr: float = 5e-3
    steps: int = 70
    stop_loss: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number(self.rank, "the rank of an adapter", least=1)
        finite_number(self.alpha, "alpha of an adapter", above=0)
        check_training(self.lr, self.steps, self.stop_loss)
        whole_number(self.seed, "the seed of an adapter")

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        wanted, no_op = not_said(bench, facts)
        if not wanted:
            return Solution(tuple(bench.no_delta(layer) for layer in bench.layers), no_op=no_op)
        generator = torch.Generator().manual_seed(self.seed)
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, edited in bench.maps.items():
            device = input_device(edited.module)
            bound = 1 / math.sqrt(edited.in_width)
            a = (torch.rand(self.rank, edited.in_width, generator=generator) * 2 - 1) * bound
            factors[layer] = a.to(device).requires_grad_(), torch.zeros(edited.out_width, self.rank, device=device, requires_grad=True)
        scale = self.alpha / self.rank
        shifts = {layer: Shift(partial(_adapted, a, b, scale), (a, b)) for layer, (a, b) in factors.items()}
        fine_tune(bench, wanted, shifts, lr=self.lr, steps=self.steps, stop_loss=self.stop_loss)
        deltas = [WeightDelta(bench.maps[layer].name, layer, scale * b, a.mT) for layer, (a, b) in factors.items()]
        return Solution(tuple(deltas), no_op=no_op)


def _adapted(a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    return scale * (x @ a.mT @ b.mT)
