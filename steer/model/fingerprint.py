"""Fingerprint: what makes a model itself, and when two of them are of one model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DIGEST, CASTS = "embedding_digest", "embedding_digests_of_casts"  # names in a fingerprint
CAST_TO = (torch.bfloat16, torch.float16)
_WIDTH = 10_000  # words a row; of what is smaller all numbers are hashed
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by the bytes of a number


def configured_kv_heads(config: Any, n_heads: int) -> int:
    """Key-value heads by a config of transformers."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    number = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return number if isinstance(number, int) else n_heads


def embedding_digests(embedding: nn.Module | None) -> dict[str, Any]:
    """Of 16 rows, as they are and as they would be after a cast to `bfloat16` and to `float16`.

    None for a DTensor shard, which does not hold the same rows on every rank.
    """
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta:
        return {DIGEST: None, CASTS: None}
    rows = weight.detach()[torch.linspace(0, weight.shape[0] - 1, 16).long().to(weight.device)].cpu()
    return {DIGEST: _digest(rows), CASTS: {str(dtype).removeprefix("torch."): _digest(rows.to(dtype)) for dtype in CAST_TO}}


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.float().numpy().tobytes()).hexdigest()[:16]


def differing(known: Any, found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of one fingerprint that another has otherwise: nothing for the same model, and for a copy of it cast to a narrower type.

    Weights are not compared where one of the two holds shards of them.
    """
    if not isinstance(known, Mapping):  # of a file
        return {"fingerprint": (known, found)}
    entries = {key: (value, found.get(key)) for key, value in known.items() if key not in (DIGEST, CASTS) and value != found.get(key)}
    digests = known.get(DIGEST), found.get(DIGEST)
    if None not in digests and digests[0] != digests[1] and cast_between(known, found) is None:
        entries[DIGEST] = digests
    return entries


def cast_between(known: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """How one model is a cast copy of the other, by their fingerprints; None for the same numbers, or another model."""
    if known.get(DIGEST) == found.get(DIGEST):
        return None
    if (dtype := _cast(known, found)) is not None:
        return f"this model is a {dtype} copy of that one"
    if (dtype := _cast(found, known)) is not None:
        return f"that one is a {dtype} copy of this model"
    return None


def _cast(source: Mapping[str, Any], copy: Mapping[str, Any]) -> str | None:
    """Type to which the source was cast for the copy."""
    casts = source.get(CASTS)
    return next((name for name, digest in casts.items() if digest == copy.get(DIGEST)), None) if isinstance(casts, Mapping) else None


def warn_of_cast(what: str, known: Mapping[str, Any], found: Mapping[str, Any], stacklevel: int = 3) -> None:
    """Warns where something was made on a model and is used on a cast copy of it, where its numbers are a little different."""
    if (cast := cast_between(known, found)) is not None:
        warnings.warn(f"{what} made on a model in another precision: {cast}; numbers differ a little", stacklevel=stacklevel)


def bits_digest(weight: Tensor) -> str:
    """Changes with the numbers of a weight and with their places; the same on any device, since sums of integers have no order.

    Of sums over rows and over columns of all its bits, modulo 2^64, which take three to five times as long as one sum: no single change,
    exchange of two numbers, or permutation of rows or columns leaves both as they are. A pattern that cancels in rows and columns does,
    such as the same two numbers exchanged along both sides of a rectangle; training leaves no such pattern.
    """
    flat = weight.detach().contiguous().view(-1)
    if flat.storage_offset():  # wider numbers would have to begin at a multiple of their size
        flat = flat.clone()
    size = flat.element_size()
    if size == 8:
        words = flat.view(torch.int32)  # so that sums of signs do not run over
    else:  # eight bytes at a time are 25 times as fast as four
        words = flat.view(_BITS[size] if flat.numel() * size % 8 else torch.int64)
    whole = words.numel() // _WIDTH * _WIDTH
    rows = words[:whole].view(-1, _WIDTH)
    digest = hashlib.sha256()
    for part in (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), words[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
