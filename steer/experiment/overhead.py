"""What steering and tracking cost a training step, measured beside the bare step in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.capture import evaluating


def step_overhead(
    model: nn.Module, batch: dict[str, Tensor], attached: Callable[[], AbstractContextManager[Any]], *, rounds: int = 5
) -> float:
    """Median ratio of the wall time of a forward and backward pass with hooks to one without, minus 1.

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
            taken = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return taken

    ratios = []
    with torch.random.fork_rng(), evaluating(model), torch.enable_grad():  # evaluating restores the mode of every module
        model.train()
        seconds(nullcontext())
        for number in range(rounds):
            arms = [attached, nullcontext] if number % 2 else [nullcontext, attached]
            taken = {arm is attached: seconds(arm()) for arm in arms}
            ratios.append(taken[True] / taken[False])
    return median(ratios) - 1.0
