"""The store of values: what an edit has to write is found once for a fact, whatever editor asks, and never used on other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from steer.edits.value import Value

_BLOCK = 1 << 22  # numbers that are widened at a time


def weights_digest(model: nn.Module) -> str:
    """Digest of every parameter and buffer, to the bit, read where they lie, and of what PEFT has switched on.

    Rows are summed with odd random weights modulo 2^64, and the sums of all rows hashed: about 0.5 s for 135 million numbers on one core,
    and nothing but the sums leaves a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            digest.update(_row_sums(tensor.detach()).cpu().numpy().tobytes())
    for path, module in model.named_modules():
        if isinstance(getattr(type(module), "disable_adapters", None), property):  # a layer of PEFT's
            state: Any = module
            digest.update(f"{path} {state.disable_adapters} {state.active_adapters} {getattr(state, 'scaling', None)}".encode())
    return digest.hexdigest()


def _row_sums(tensor: Tensor) -> Tensor:
    """[rows] int64."""
    rows = tensor.contiguous().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
    bits = rows.view(torch.uint8) if rows.dtype is torch.bool else rows.view(_INTEGERS[rows.element_size()])
    weights = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    weights = weights.to(bits.device)
    height = max(1, _BLOCK // bits.shape[1])
    return torch.cat([(part.to(torch.int64) * weights).sum(1) for part in bits.split(height)])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ValueStore:
    """Keeps values in memory, by weights, fact, layer, contexts and settings.

    Hand one store to several calls of `edit_facts` to compare editors: the optimisation, the larger part of an edit, runs once.

    Example:
        >>> store = ValueStore()
        >>> for editor in ("rome", "memit", "alphaedit"):
        ...     edit = edit_facts(model, tokenizer, facts, editor=editor, layers=[8], values=store)
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
