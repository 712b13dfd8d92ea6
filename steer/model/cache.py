"""Notes on a KV cache, which go with it wherever it goes: two generations are mixed up no more than their caches are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# attributes that we put on a cache: what its prompt decided, where its prompt ended, the phase of a prompt that was no generation's
MEMORY = "_steer_memory"
PASSES = "_steer_passes"
PROMPT_PHASE = "_steer_prompt_phase"
TOKENS = "_steer_tokens"  # of a cache that does not count them


@dataclass(eq=False)
class GenerationMemory:
    """What the prompt of a cache decided for the tokens decoded from it.

    Attributes:
        tensors: by name, [batch or 1, ...] each.
        length: [batch, 1] number of real tokens in the cache when it held `length_at` entries; None where nobody counted.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    length: Tensor | None = None
    length_at: int = -1

    def length_before(self, past: int) -> Tensor | None:
        """[batch, 1]: number of real tokens in a cache of `past` entries; None when that was not counted."""
        return self.length if self.length_at == past else None

    def set_length(self, length: Tensor, entries: int) -> None:
        """Notes how many real tokens each row has. length: [batch, 1]; entries: of the cache after this pass."""
        self.length = length
        self.length_at = entries

    def reorder(self, rows: Tensor | int, *, repeat: bool) -> None:
        """Follows a cache whose rows are moved. rows: the new order, or how often each row is repeated."""
        self.tensors = {name: _reordered(tensor, rows, repeat) for name, tensor in self.tensors.items()}
        if self.length is not None:
            self.length = _reordered(self.length, rows, repeat)


def _reordered(tensor: Tensor, rows: Tensor | int, repeat: bool) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor  # one entry for all rows stays one
    return tensor.repeat_interleave(rows, 0) if repeat else tensor[rows.to(tensor.device)]  # type: ignore[union-attr]


class _ReorderingMethod:
    """Method of one KV cache that moves its rows, and with them what is remembered of these."""

    def __init__(self, cache: Any, name: str) -> None:
        # nothing may keep a cache alive but its user: it can be as large as the model
        self.cache = weakref.ref(cache)
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReorderingMethod:
        cache = self.cache()
        return _ReorderingMethod(memo.get(id(cache), cache), self.name)

    def __call__(self, rows: Any) -> Any:
        cache = self.cache()
        memory: GenerationMemory = getattr(cache, MEMORY)
        memory.reorder(rows, repeat=self.name == "batch_repeat_interleave")
        return getattr(type(cache), self.name)(cache, rows)


def takes_notes(cache: Any) -> bool:
    """Whether anything can be noted on a cache. A list of tensors, as a module of one's own may have, does not say how much it holds."""
    return cache is None or hasattr(cache, "__dict__") and not isinstance(cache, Tensor)


def put_memory(cache: Any, memory: GenerationMemory) -> None:
    """Puts a memory on a KV cache, with which it is copied and reordered."""
    setattr(cache, MEMORY, memory)
    if not torch.compiler.is_compiling():
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            if hasattr(type(cache), name):
                setattr(cache, name, _ReorderingMethod(cache, name))


def memory_of(cache: Any) -> GenerationMemory:
    """The memory that lives on a KV cache; made where there is none."""
    memory = getattr(cache, MEMORY, None)
    if memory is None:
        memory = GenerationMemory({}, None, -1)
        if cache is not None:
            put_memory(cache, memory)
    return memory


def cached_tokens(cache: Any) -> Tensor | int:
    """Tokens that went into a cache. One of states alone (state space, linear attention) keeps no entries: its passes are counted."""
    try:
        return cache.get_seq_length()
    except (ValueError, AttributeError):
        return getattr(cache, TOKENS, 0)


def note_pass(cache: Any, past: Tensor | int, tokens: int) -> bool:
    """Notes a pass on its cache.

    Returns:
        True when the passes so far are not those of a prompt and of tokens decoded one by one. A copied cache may hold the first part of
        the prompt. Decoded tokens may be cropped off the cache again, a part of the prompt may not.
    """
    prompt_end, follows_prompt, noted_on = getattr(cache, PASSES, (0, False, id(cache)))
    # the length of a static cache is read, which waits for the device, only where a prompt follows a prompt
    follows_prompt = follows_prompt and noted_on == id(cache) and tokens > 1 and bool(past > 0)
    if cache is not None:
        end = prompt_end
        if tokens > 1 or not prompt_end:
            end = past + tokens if isinstance(past, int) else 0
        setattr(cache, PASSES, (end, tokens > 1, id(cache)))
        if isinstance(past, int):
            setattr(cache, TOKENS, past + tokens)
    return follows_prompt or isinstance(past, int) and past < prompt_end
