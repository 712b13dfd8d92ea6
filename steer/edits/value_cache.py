"""The store of values: what an edit has to write is found once for a fact, whatever editor asks, and never used on other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from torch import nn

from steer.model.fingerprint import sum_of_bits

if TYPE_CHECKING:
    from steer.edits.value import Value


def weights_digest(model: nn.Module) -> str:
    """Digest of every parameter and buffer, read where they lie, and of what PEFT has switched on."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        bits = None if tensor.is_meta else sum_of_bits(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {bits}\n".encode())
    for path, module in model.named_modules():
        if isinstance(getattr(type(module), "disable_adapters", None), property):  # a layer of PEFT's
            state: Any = module
            digest.update(f"{path} {state.disable_adapters} {state.active_adapters} {getattr(state, 'scaling', None)}\n".encode())
    return digest.hexdigest()


class ValueStore:
    """Keeps values in memory, by weights, fact, layer, contexts and settings.

    Hand one store to several calls of `edit_facts` to compare editors: the optimisation, the larger part of an edit, runs once.

    Example:
        >>> store = ValueStore()
        >>> how = {"layers": [8], "covariance": covariance, "contexts": contexts, "values": store}
        >>> for editor in ("rome", "memit"):  # the second takes the values that the first has solved
        ...     edit = steer.edit_facts(model, tokenizer, fact, editor=editor, **how)
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, Value] = {}
        self.found = 0  # how many values were not optimised again

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value under a key, None where there is none."""
        value = self._values.get(key)
        self.found += value is not None
        return value

    def put(self, key: Hashable, value: Value) -> None:
        self._values[key] = value
