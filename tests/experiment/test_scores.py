"""Scores: what belongs together is subtracted, what is missing is named, and the table comes back as it was."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from steer.errors import ConfigError
from steer.experiment.scores import COLUMNS, Place, Scores

A, B, C = "a", "b", "c"


def filled() -> Scores:
    """Arm warm with seeds 0 and 2, its control of two draws, and a base of one seed; the items come in other orders."""
    scores = Scores()
    scores.add(Place("gap", "warm", 0, 2), {C: 6.0, A: 4.0, B: 5.0})
    scores.add(Place("gap", "warm", 0, 0), {A: 1.0, B: 2.0, C: 3.0})
    for draw in (0, 1):
        for seed in (0, 2):
            scores.add(Place("gap", "random", draw, seed), {B: 20.0 + draw, A: 10.0 + draw, C: 30.0 + draw + seed})
    scores.add(Place("gap", "plain", 0, 0), {A: 1.0, B: 1.0, C: 2.0})
    scores.add(Place("loss", "plain", 0, 0), {"x": 0.1, "y": 1 / 3})
    return scores


def test_items_and_seeds_are_in_their_places() -> None:
    scores = filled()
    matrix = scores.matrix("gap", "warm")
    assert matrix.seeds == (0, 2) and sorted(matrix.items) == [A, B, C]
    found = {item: matrix.values[row].tolist() for row, item in enumerate(matrix.items)}
    assert found == {A: [1.0, 4.0], B: [2.0, 5.0], C: [3.0, 6.0]}
    assert (scores.outcomes, scores.arms, scores.draws("random"), scores.seeds("warm")) == (
        ["gap", "loss"],
        ["warm", "random", "plain"],
        [0, 1],
        [0, 2],
    )
    assert len(scores) == 6 + 12 + 3 + 2 and "23 values of gap, loss in warm, random, plain" in repr(scores)


def test_draws_of_a_control_are_averaged_unless_one_is_named() -> None:
    scores = filled()
    for draw, expected in ((None, 10.5), (0, 10.0), (1, 11.0)):
        matrix = scores.matrix("gap", "random", draw)
        assert matrix.values[matrix.items.index(A)].tolist() == [expected, expected]


def test_a_difference_is_item_by_item_and_seed_by_seed() -> None:
    difference = filled().difference("gap", "warm", "random", 1)
    found = {item: difference.values[row].tolist() for row, item in enumerate(difference.items)}
    assert found == {A: [-10.0, -7.0], B: [-19.0, -16.0], C: [-28.0, -27.0]}


def test_a_reference_of_one_seed_stands_for_each() -> None:
    scores = filled()
    difference = scores.difference("gap", "warm", "plain")
    assert {item: difference.values[row].tolist() for row, item in enumerate(difference.items)} == {
        A: [0.0, 3.0],
        B: [1.0, 4.0],
        C: [1.0, 4.0],
    }
    with pytest.raises(ConfigError, match="not run with the same seeds"):
        scores.difference("gap", "plain", "warm")


def test_values_keep_every_digit() -> None:
    scores = Scores()
    scores.add(Place("loss", "plain", 0, 0), {"x": 1 / 3, "y": 1e-300})
    values = scores.matrix("loss", "plain").values
    assert values.dtype == torch.float64 and values[:, 0].tolist() == [1 / 3, 1e-300]


def test_what_does_not_belong_together_is_refused() -> None:
    scores = filled()
    with pytest.raises(ConfigError, match="measured twice"):
        scores.add(Place("gap", "warm", 0, 0), {A: 1.0, B: 2.0, C: 3.0})
    with pytest.raises(ConfigError, match=r"'gap' of arm 'new' is of other items[\s\S]*1 missing \(c\), 1 more \(d\)"):
        scores.add(Place("gap", "new", 0, 0), {A: 1.0, B: 2.0, "d": 3.0})
    scores.add(Place("gap", "random", 2, 0), {A: 1.0, B: 2.0, C: 3.0})
    with pytest.raises(ConfigError, match=r"lacks draws of seed 2[\s\S]*without 2"):
        scores.matrix("gap", "random")
    for outcome, arm, draw in (("gap", "wram", None), ("gpa", "warm", None), ("gap", "warm", 3)):
        with pytest.raises(ConfigError, match="was not measured"):
            scores.matrix(outcome, arm, draw)


def test_items_are_known_by_their_text() -> None:
    """Ids of a benchmark may be numbers, which JSON keys are not."""
    scores = Scores()
    scores.add(Place("gap", "plain", 0, 0), {1: 1.0, 2: 2.0})  # type: ignore[dict-item]
    scores.add(Place("gap", "warm", 0, 0), {"2": 4.0, "1": 3.0})
    assert scores.difference("gap", "warm", "plain").values[:, 0].tolist() == [2.0, 2.0]


# ---- files


def test_the_table_comes_back_as_it_was(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    scores = filled()
    path = scores.save(tmp_path / "scores.parquet")
    table = parquet.read_table(path)
    assert path.name == "scores.parquet" and tuple(table.column_names) == COLUMNS
    assert table.to_pylist() == list(scores.rows())


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_it_is_text_where_pyarrow_is_not_installed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    scores = filled()
    path = scores.save(tmp_path / name)
    assert path == tmp_path / "scores.csv" and [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    with path.open(newline="") as file:
        rows = [{**row, "draw": int(row["draw"]), "seed": int(row["seed"]), "value": float(row["value"])} for row in csv.DictReader(file)]
    assert rows == list(scores.rows())
