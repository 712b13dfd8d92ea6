"""Fingerprint: what makes a model itself."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def configured_kv_heads(config: Any, n_heads: int) -> int:
    """Key-value heads by a config of transformers."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    number = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return number if isinstance(number, int) else n_heads


def embedding_digest(embedding: nn.Module | None) -> str | None:
    """Of 16 rows; None for a DTensor shard, which does not hold the same rows on every rank."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta:
        return None
    rows = torch.linspace(0, weight.shape[0] - 1, 16).long()
    return hashlib.sha256(weight.detach()[rows.to(weight.device)].float().cpu().numpy().tobytes()).hexdigest()[:16]


def sum_of_bits(weight: Tensor) -> int:
    """A number that changes with a weight: the same on any device, whatever the order in which it is added up."""
    flat = weight.detach().contiguous().view(-1)
    if flat.storage_offset():  # wider numbers would have to begin at a multiple of their size
        flat = flat.clone()
    is_even = flat.numel() * flat.element_size() % 8 == 0
    # eight bytes at a time, which is 25 times as fast as four
    return int(flat.view(torch.int64 if is_even else _BITS[flat.element_size()]).sum(dtype=torch.long))
