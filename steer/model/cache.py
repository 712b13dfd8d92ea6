"""What is noted on a KV cache, and goes with it wherever it goes: no two generations are ever mixed up more than their caches are."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# attributes of a cache: what was worked out on its prompt, the passes so far, the phase of a prompt that was no generation's
MEMORY, PASSES, OUTSIDE = "_steer_memory", "_steer_passes", "_steer_outside"


class _Reordering:
    """A method of one KV cache that moves its rows, and with them what is remembered of these."""

    def __init__(self, cache: Any, name: str) -> None:
        # nothing may keep a cache alive but its user: it can be as large as the model
        self.cache, self.name = weakref.ref(cache), name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reordering:
        cache = self.cache()
        return _Reordering(memo.get(id(cache), cache), self.name)

    def __call__(self, rows: Any) -> Any:
        cache = self.cache()
        memory: dict[str, Tensor] = getattr(cache, MEMORY)
        for key, held in memory.items():
            if held.shape[0] > 1:
                repeated = self.name == "batch_repeat_interleave"
                memory[key] = held.repeat_interleave(rows, 0) if repeated else held[rows.to(held.device)]
        return getattr(type(cache), self.name)(cache, rows)


def keep(cache: Any, memory: dict[str, Tensor]) -> None:
    """Puts a memory on a KV cache, with which it is copied and reordered."""
    setattr(cache, MEMORY, memory)
    if not torch.compiler.is_compiling():
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            if hasattr(type(cache), name):
                setattr(cache, name, _Reordering(cache, name))


def memory_of(cache: Any) -> dict[str, Tensor]:
    """The memory that lives on a KV cache; made where there is none."""
    memory = getattr(cache, MEMORY, None)
    if memory is None:
        memory = {}
        if cache is not None:
            keep(cache, memory)
    return memory


def note_pass(cache: Any, past: Tensor | int, tokens: int) -> bool:
    """Notes a pass on its cache.

    Returns:
        True when the passes so far are not those of a prompt and of tokens decoded one by one. A copied cache may hold the first part of
        the prompt.
    """
    seen, follows, noted_on = getattr(cache, PASSES, (0, False, id(cache)))
    # the length of a static cache is read, which waits for the device, only where a prompt follows a prompt
    follows = follows and noted_on == id(cache) and tokens > 1 and bool(past > 0)
    if cache is not None:
        setattr(cache, PASSES, (past + tokens if isinstance(past, int) else 0, tokens > 1, id(cache)))
    return follows or isinstance(past, int) and past < seen
