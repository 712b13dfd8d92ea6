"""Overlap between the texts that a circuit was made with and those that it is measured on, from hashes that stay with the circuit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from steer.model.tokens import Row

WINDOW = 32  # tokens


def window_hashes(rows: Sequence[Row]) -> list[str]:
    """Hashes of texts: of every stretch of 32 tokens one after the other, or of the whole text where it is shorter. Sorted, each once."""
    found = set()
    for row in rows:
        starts = range(0, len(row.ids) - WINDOW + 1, WINDOW) if len(row.ids) >= WINDOW else [0]
        found |= {_hash(row.ids[start : start + WINDOW]) for start in starts}
    return sorted(found)


def overlapping(rows: Sequence[Row], hashes: Sequence[str]) -> list[int]:
    """Numbers of the texts of which a stretch, wherever it begins, is among the hashes: any that share 63 tokens in a row, or are equal."""
    known = set(hashes)
    return [number for number, row in enumerate(rows) if any(each in known for each in _all_hashes(row))]


def _all_hashes(row: Row) -> list[str]:
    return [_hash(row.ids[start : start + WINDOW]) for start in range(max(1, len(row.ids) - WINDOW + 1))]


def _hash(ids: Sequence[int]) -> str:
    return hashlib.blake2b(" ".join(map(str, ids)).encode(), digest_size=8).hexdigest()
