"""How long missing cells take: by arm, else by kind, else not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.commands.forecast import Forecast
from steer.experiment.cells import Cell, CellFolder

BASE = Cell("base", 0, 0, {})


def trained(arm: str, seed: int = 0) -> Cell:
    return Cell(arm, 0, seed, {"arm": arm})


def using(other: Cell) -> Cell:
    return Cell("inference", 0, other.seed, {"arm": "inference"}, other)


@pytest.fixture
def cells(tmp_path: Path) -> CellFolder:
    return CellFolder(tmp_path)


def forecast(cells: CellFolder, seconds: dict[Cell, float], *, trains: bool = True) -> Forecast:
    for cell, each in seconds.items():
        cells.begin(cell)
        cells.finish(cell, {"timing": {"seconds": each}})
    return Forecast(seconds, cells, trains=trains)


def test_nothing_is_known_before_a_cell_of_each_kind(cells: CellFolder) -> None:
    known = forecast(cells, {BASE: 10.0})
    assert known.of([trained("plain")]) is None, "the base is measured alone: a cell that trains takes longer"
    assert known.of([using(trained("plain"))]) == 10.0
    assert known.of([]) == 0.0 and known.of_arm("plain") is None


def test_by_arm_and_else_by_kind(cells: CellFolder) -> None:
    plain = trained("plain")
    known = forecast(cells, {BASE: 10.0, plain: 60.0, trained("plain", 1): 70.0, trained("plain", 2): 500.0, using(plain): 14.0})
    assert known.of_arm("plain") == 70.0, "the median: one that was disturbed says little"
    assert known.of([trained("plain", 3), trained("steered"), using(trained("plain", 1))]) == 70 + 70 + 14
    steered = trained("steered")
    cells.begin(steered)
    cells.finish(steered, {"timing": {"seconds": 90.0}})
    known.add(steered)
    assert known.of([trained("steered", 1)]) == 90.0


def test_where_nothing_is_trained_every_cell_is_alike(cells: CellFolder) -> None:
    assert forecast(cells, {BASE: 10.0}, trains=False).of([trained("a"), trained("b")]) == 20.0
