"""Passes that begin in the middle of a model: the blocks below run once, and the blocks above go on from there, as often as needed.

Blocks are skipped by putting another `forward` in their place. The model itself still makes masks and positions for all its rows, and
hooks on the blocks run as ever, so nothing has to be known of how a family calls them but that each takes what the one below gave.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from steer.model.prefix import replaced_forwards


class StoppedPass(Exception):
    """All that was wanted of a forward pass is there; its rest is not needed."""


@contextmanager
def recorded_blocks(blocks: Sequence[nn.Module], depths: Collection[int]) -> Iterator[dict[int, Any]]:
    """Records, in the passes of a block of code, what reaches each depth, and stops them at the deepest.

    Args:
        depths: numbers of blocks, 1 or more; at depth d stands what the first d blocks give, before hooks change it.

    Yields:
        By depth, what block d - 1 returned in the last pass.
    """
    records: dict[int, Any] = {}
    deepest = max(depths)

    def recording(depth: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            records[depth] = forward(*args, **kwargs)
            if depth == deepest:
                raise StoppedPass
            return records[depth]

        return record

    forwards = {blocks[depth - 1]: recording(depth, blocks[depth - 1].forward) for depth in depths}
    with replaced_forwards(forwards), suppress(StoppedPass):
        yield records


@contextmanager
def resumed(blocks: Sequence[nn.Module], depth: int, record: Any, repeats: int) -> Iterator[None]:
    """Lets the passes of a block of code begin at a depth.

    Args:
        depth: number of blocks that are skipped; with 0 nothing is.
        record: what the last of them gave, see `recorded_blocks`, [batch, tokens, width].
        repeats: how often its rows are repeated, one copy of the whole batch after the other.
    """
    if depth == 0:
        yield
        return

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return _with_hidden(record, args[0] if args else kwargs["hidden_states"])

    def last(*args: Any, **kwargs: Any) -> Any:
        hidden = record if isinstance(record, Tensor) else record[0]
        return _with_hidden(record, hidden.repeat(repeats, 1, 1))  # [repeats * batch, tokens, width]

    with replaced_forwards({**dict.fromkeys(blocks[: depth - 1], skipped), blocks[depth - 1]: last}):
        yield


def _with_hidden(record: Any, hidden: Tensor) -> Any:
    """Another hidden state, in the form in which the blocks of this model return theirs."""
    return hidden if isinstance(record, Tensor) else type(record)((hidden, *record[1:]))
