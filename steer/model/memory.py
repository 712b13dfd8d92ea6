"""Work that goes on in halves where memory does not suffice for all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_halves(items: Sequence[Item], run: Callable[[Sequence[Item]], Result]) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yields items, in order, with what `run` gives for them: all at once, or in halves as often as memory runs out.

    Raises:
        MemoryError, torch.OutOfMemoryError: it does not suffice for one of them alone.
    """
    try:
        result = run(items)
    except (MemoryError, torch.OutOfMemoryError):
        if len(items) <= 1:
            raise
    else:
        yield items, result
        return
    half = len(items) // 2  # outside of the `except`, whose traceback would hold the tensors of the failed run
    yield from in_halves(items[:half], run)
    yield from in_halves(items[half:], run)
