"""How long the missing cells of an experiment will take, from those that are done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from steer.commands.experiment_config import BASE
from steer.experiment.cells import Cell, CellFolder


class Forecast:
    """Seconds that cells took, by arm.

    A cell of an arm that was not run yet is taken to last as long as those that train as it does, or that do not.

    Args:
        done: cells that are done.
        cells: where their results lie.
        trains: the experiment fine-tunes.
    """

    def __init__(self, done: Iterable[Cell], cells: CellFolder, *, trains: bool) -> None:
        self.cells = cells
        self.trains = trains
        self._seconds: dict[str, list[float]] = {}
        self._of_kind: dict[bool, list[float]] = {}
        for cell in done:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        """Counts a cell that is done now."""
        seconds = float(self.cells.result(cell)["timing"]["seconds"])
        self._seconds.setdefault(cell.arm, []).append(seconds)
        self._of_kind.setdefault(self._is_trained(cell), []).append(seconds)

    def of_arm(self, arm: str) -> float | None:
        """Median seconds of a cell of an arm; None when none is done."""
        return median(self._seconds[arm]) if arm in self._seconds else None

    def of(self, missing: Sequence[Cell]) -> float | None:
        """Seconds of these cells in one process; None when no cell of some kind was run yet."""
        seconds = [self._of_cell(cell) for cell in missing]
        known = [each for each in seconds if each is not None]
        return sum(known) if len(known) == len(seconds) else None

    def _of_cell(self, cell: Cell) -> float | None:
        of_arm = self.of_arm(cell.arm)
        of_kind = self._of_kind.get(self._is_trained(cell))
        return of_arm if of_arm is not None or of_kind is None else median(of_kind)

    def _is_trained(self, cell: Cell) -> bool:
        return self.trains and cell.needs is None and cell.arm != BASE
