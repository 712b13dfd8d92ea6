"""When each cell of a batch begins to differ from the corrupted run, or from another cell, and its rows have to be run from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.edits.tracing.cells import MLP, Cell


@dataclass(frozen=True)
class Joining:
    """How a cell comes into a batch.

    Attributes:
        layer: the first block that runs for it; the number of blocks where none does.
        like: place in the batch of the cell that it is the same as below that layer; None for the corrupted run.
    """

    cell: Cell
    layer: int
    like: int | None = None


def joinings(cells: Sequence[Cell], n_layers: int) -> list[Joining]:
    """The cells of one token in the order in which they join, others that they are like before them."""
    trunks: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        trunk = trunks.setdefault((cell.kind, cell.layers.start), cell)
        if cell.layers.stop > trunk.layers.stop:
            trunks[cell.kind, cell.layers.start] = cell
    layer_of: dict[Cell, int] = {}
    like: dict[Cell, Cell] = {}
    for cell in cells:
        trunk = trunks[cell.kind, cell.layers.start]
        layer_of[cell] = _begins(cell, n_layers)
        # windows that begin together are the same until the shorter one ends
        if cell is not trunk and cell.layers.stop > _begins(trunk, n_layers):
            layer_of[cell], like[cell] = cell.layers.stop, trunk
    ordered = sorted(cells, key=layer_of.__getitem__)
    return [Joining(cell, layer_of[cell], ordered.index(like[cell]) if cell in like else None) for cell in ordered]


def _begins(cell: Cell, n_layers: int) -> int:
    """The first block that has to run for a cell on its own."""
    # what an MLP adds is another number, which can be added to the stream that was kept in front of the next block
    return cell.joins + 1 if cell.kind == MLP and cell.joins + 1 < n_layers else cell.joins
