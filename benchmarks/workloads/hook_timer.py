"""The time that a forward pass spends inside hooks, taken where they run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from torch import nn


class HookTimer:
    """Notes the time inside every call of a forward hook or forward pre-hook of a model, while the block runs.

    Each entry of the modules' hook dictionaries is replaced by a function that calls it between two readings of the clock. The hooks keep
    their keys and their order. PyTorch's own dispatch of a module with hooks is not included.

    Attributes:
        nanoseconds: of each call since the last `reset`, in order, the two readings of the clock included.

    Example:
        with HookTimer(model) as timer:
            model(ids)
            print(sum(timer.nanoseconds) / 1000, "us in", len(timer.nanoseconds), "calls")
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nanoseconds: list[int] = []
        self._replaced: list[tuple[dict[int, Any], int, Any, Any]] = []

    def __enter__(self) -> HookTimer:
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    timed = self._timed(hook)
                    hooks[key] = timed  # an existing key keeps its place in the order
                    self._replaced.append((hooks, key, hook, timed))
        return self

    def __exit__(self, *_: Any) -> None:
        for hooks, key, hook, timed in self._replaced:
            if hooks.get(key) is timed:
                hooks[key] = hook
        self._replaced.clear()

    def reset(self) -> None:
        self.nanoseconds = []

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = perf_counter_ns()
            result = hook(*arguments)
            self.nanoseconds.append(perf_counter_ns() - started)
            return result

        return timed


def per_pass(passes: list[list[int]]) -> float:
    """Microseconds inside hooks in a pass: the median over passes of each call, summed over the calls.

    The median of sums would not do: on a busy machine hardly a pass goes by without some hook being interrupted, but each one is rarely.

    Args:
        passes: `HookTimer.nanoseconds` of several passes.

    Raises:
        ValueError: passes with different numbers of calls.
    """
    return sum(statistics.median(calls) for calls in zip(*passes, strict=True)) / 1e3
