"""What steering and tracking cost a training step, measured beside the bare step in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Overhead(NamedTuple):
    """Fractions of the bare step: the median over the rounds, and the lowest and highest round. Five rounds enclose the true median in
    94 of 100 runs, so a range that holds zero is within noise."""

    median: float
    low: float
    high: float


def step_overhead(
    model: nn.Module, batch: dict[str, Tensor], attached: Callable[[], AbstractContextManager[Any]], *, rounds: int = 5
) -> Overhead:
    """Ratio of the wall time of a forward and backward pass with hooks to one without, minus 1.

    Args:
        model: run in training mode; gradients are computed and thrown away. Weights, modes and random state are left as they were.
        batch: arguments of the model, labels included.
        attached: makes a context manager that holds the hooks.
        rounds: pairs of steps; each pair runs in the opposite order of the one before.
    """

    def seconds(context: AbstractContextManager[Any]) -> float:
        with context:
            started = time.perf_counter()
            model(**batch, use_cache=False).loss.backward()
            elapsed = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return elapsed

    ratios = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model.train()
            seconds(nullcontext())  # the first pass allocates memory
            for number in range(rounds):
                order = [attached, nullcontext] if number % 2 else [nullcontext, attached]
                elapsed = {context is attached: seconds(context()) for context in order}
                ratios.append(elapsed[True] / elapsed[False])
    finally:
        for module, mode in modes:
            module.training = mode
    return Overhead(median(ratios) - 1.0, min(ratios) - 1.0, max(ratios) - 1.0)
