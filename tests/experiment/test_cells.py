"""Cells: named by what their result depends on, finished in one step, run once, each after what it needs."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ended, started

from steer.errors import ConfigError, DamagedFileError
from steer.experiment import cells as module
from steer.experiment.cells import DONE, Cell, CellFolder, in_order, run_missing, state
from steer.experiment.lease import is_held, lease

SPEC = {"model": {"name": "m"}, "train": {"steps": 3, "rate": 2e-3}, "treatment": {"kind": "none"}}
PLAIN = Cell("plain", 0, 0, SPEC)
LATER = Cell("later", 0, 0, {**SPEC, "when": "inference"}, needs=PLAIN)
RESULT = {"scores": {"gap": {"a": 0.1}}, "timing": {"seconds": 1.0}}


def many() -> list[Cell]:
    """Six trained cells, and one of each that uses their weights; those first."""
    trained = [Cell("plain", 0, seed, SPEC) for seed in range(3)] + [Cell("random", draw, 0, SPEC) for draw in range(3)]
    return [*(Cell("later", cell.draw, cell.seed, {"of": cell.arm}, needs=cell) for cell in trained), *trained]


def run_all(cells: list[Cell], folder: CellFolder) -> list[str]:
    """Names of the cells that were run, in order."""
    ran: list[str] = []

    def run(cell: Cell) -> dict[str, Any]:
        ran.append(cell.name)
        return RESULT

    finished = list(run_missing(cells, folder, run))
    assert {cell.key for cell in finished} >= {cell.key for cell in cells if cell.name in ran}
    return ran


# ---- what a cell is called


def test_the_key_follows_from_what_matters_alone() -> None:
    assert PLAIN.key == Cell("plain", 0, 0, json.loads(json.dumps(SPEC))).key, "also when it was read back"
    assert PLAIN.key == Cell("plain", 0, 0, dict(reversed(SPEC.items()))).key, "not the order of the keys"
    assert PLAIN.key == dataclasses.replace(PLAIN, arm="renamed").key
    others = [
        dataclasses.replace(PLAIN, draw=1),
        dataclasses.replace(PLAIN, seed=1),
        dataclasses.replace(PLAIN, spec={**SPEC, "train": {"steps": 4, "rate": 2e-3}}),
        dataclasses.replace(PLAIN, spec={**SPEC, "train": {"steps": 3, "rate": 2e-3 + 1e-18}}),
        dataclasses.replace(PLAIN, needs=Cell("other", 0, 0, {})),
        dataclasses.replace(LATER, needs=dataclasses.replace(PLAIN, seed=1)),
        LATER,
    ]
    keys = [PLAIN.key, *(cell.key for cell in others)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("arm", ["a/b", "../up", "so sagt's \N{LATIN SMALL LETTER U WITH DIAERESIS}", "a\nb", "against x0.5"])
def test_a_name_is_that_of_one_folder(arm: str, tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    cell = Cell(arm, 0, 0, {"arm": arm})
    folder.finish(cell, RESULT)
    assert folder.of(cell).parent == tmp_path and folder.is_done(cell) and not set("/\n '") & set(cell.name)


# ---- a finished cell


def test_a_cell_is_finished_in_one_step(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    assert state(PLAIN, folder) == "missing" and not folder.is_done(PLAIN)
    with pytest.raises(ConfigError, match=f"cell '{PLAIN.name}' is not finished"):
        folder.result(PLAIN)
    with lease(folder.of(PLAIN)):
        assert state(PLAIN, folder) == "running"
    assert state(PLAIN, folder) == "begun" and not folder.is_done(PLAIN)
    folder.finish(PLAIN, RESULT)
    assert state(PLAIN, folder) == "done" and folder.result(PLAIN) == RESULT
    assert json.loads((folder.of(PLAIN) / DONE).read_text())["spec"] == SPEC


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_result_that_is_no_json_finishes_nothing(tmp_path: Path, number: float) -> None:
    folder = CellFolder(tmp_path)
    with pytest.raises(ValueError):
        folder.finish(PLAIN, {"scores": {"gap": {"a": number}}})
    assert not folder.is_done(PLAIN)


@pytest.mark.parametrize("kind", ["altered", "cut", "list", "unsealed", "another"])
def test_a_result_that_is_not_that_of_the_cell_is_refused(tmp_path: Path, kind: str) -> None:
    folder = CellFolder(tmp_path)
    folder.finish(PLAIN, RESULT)
    file = folder.of(PLAIN) / DONE
    text = file.read_text()
    content = json.loads(text)
    if kind == "another":
        folder.finish(LATER, RESULT)
        text = (folder.of(LATER) / DONE).read_text()
    file.write_text(
        {
            "altered": text.replace("0.1", "0.2"),
            "cut": text[:-20],
            "list": "[]",
            "unsealed": json.dumps({key: value for key, value in content.items() if "sha256" not in key}),
            "another": text,
        }[kind]
    )
    with pytest.raises(DamagedFileError) as caught:
        folder.result(PLAIN)
    assert str(file) in str(caught.value) and None not in (caught.value.expected, caught.value.found)
    assert str(file.parent) in caught.value.remedy, "one cell is run again, not all"


def test_a_file_is_no_folder_of_cells(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("mine")
    for folders in [(tmp_path / "cells",), (tmp_path / "others", [tmp_path / "cells"])]:
        with pytest.raises(ConfigError, match="holds no cells"):
            CellFolder(*folders)


@pytest.mark.parametrize(
    ("theirs", "differs"), [({}, ""), ({"model": {"name": "n"}}, "model"), ({"measured_in": "bf16-mixed"}, "experiment.precision")]
)
def test_cells_of_other_folders_are_of_the_same_experiment(tmp_path: Path, theirs: dict[str, Any], differs: str) -> None:
    """A key that either of the two has alone is a difference, too."""
    shared = {key: SPEC[key] for key in ("model", "train")}
    CellFolder(tmp_path / "theirs").finish(dataclasses.replace(LATER, spec={**LATER.spec, **theirs}), RESULT)
    folder = CellFolder(tmp_path / "ours", [tmp_path / "theirs"])
    if not differs:
        folder.check_others(shared)
        return
    with pytest.raises(ConfigError, match="another experiment") as caught:
        folder.check_others(shared)
    assert differs in str(caught.value.found)
    CellFolder(tmp_path / "more").finish(LATER, RESULT)
    with pytest.raises(ConfigError, match="another experiment"):
        CellFolder(tmp_path / "ours", [tmp_path / "more"]).check_others({**shared, **theirs})


# ---- running what is missing


def test_every_cell_is_run_once_and_after_what_it_needs(tmp_path: Path) -> None:
    folder, cells = CellFolder(tmp_path), many()
    ran = run_all(cells, folder)
    assert sorted(ran) == sorted(cell.name for cell in cells)
    for cell in cells:
        if cell.needs is not None:
            assert ran.index(cell.needs.name) < ran.index(cell.name)
    assert run_all(cells, folder) == [], "nothing is run again"
    folder.of(cells[0]).joinpath(DONE).unlink()
    assert run_all(cells, folder) == [cells[0].name]
    assert not any(is_held(folder.of(cell)) for cell in cells)


def test_what_a_cell_needs_is_run_even_when_nobody_asked_for_it(tmp_path: Path) -> None:
    assert run_all([LATER], CellFolder(tmp_path)) == [PLAIN.name, LATER.name]
    chain = Cell("third", 0, 0, {}, needs=LATER)
    assert [cell.arm for cell in in_order([chain, chain, LATER])] == ["plain", "later", "third"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_cell_that_fails_is_not_finished_and_is_let_go(tmp_path: Path, stop: type[BaseException]) -> None:
    folder = CellFolder(tmp_path)

    def fails(cell: Cell) -> dict[str, Any]:
        assert state(cell, folder) == "running"
        if cell.arm == "later":
            raise stop("no")
        return RESULT

    with pytest.raises(stop):
        list(run_missing([LATER], folder, fails))
    assert folder.is_done(PLAIN) and state(LATER, folder) == "begun" and not is_held(folder.of(LATER))
    assert run_all([LATER], folder) == [LATER.name]


def test_a_cell_that_somebody_else_runs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.01)
    folder = CellFolder(tmp_path)
    with lease(folder.of(PLAIN)):
        other = threading.Timer(0.2, lambda: folder.finish(PLAIN, RESULT))
        other.start()
        assert run_all([PLAIN, LATER], folder) == [LATER.name], "the plain cell is left to them, and its user waits for it"
        other.join()


def test_a_cell_that_somebody_else_gave_up_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CellFolder(tmp_path)
    held = lease(folder.of(PLAIN))
    assert held.__enter__()
    looks: list[float] = []

    def poll(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr(module.time, "sleep", poll)
    assert run_all([PLAIN], folder) == [PLAIN.name] and len(looks) == 3


def test_a_cell_that_was_finished_between_the_look_and_the_lease_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CellFolder(tmp_path)
    take = module.lease

    def slow(place: Path) -> Any:
        folder.finish(PLAIN, RESULT)
        return take(place)

    monkeypatch.setattr(module, "lease", slow)
    assert run_all([PLAIN], folder) == []


def worker(path: Path, at_least: float, at_most: float) -> None:
    """Runs what is missing; a cell takes some seconds between these."""
    module._POLL = 0.01
    folder, chance = CellFolder(path), random.Random(os.getpid())

    def run(cell: Cell) -> dict[str, Any]:
        assert cell.needs is None or folder.is_done(cell.needs)
        with open(folder.of(cell) / "ran", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(chance.uniform(at_least, at_most))
        return RESULT

    list(module.run_missing(many(), folder, run))


def test_processes_on_one_folder_run_no_cell_twice(tmp_path: Path) -> None:
    assert ended([started(worker, tmp_path, 0, 0.05) for _ in range(3)]) == [0, 0, 0]
    folder = CellFolder(tmp_path)
    for cell in many():
        assert folder.result(cell) == RESULT
        assert len((folder.of(cell) / "ran").read_text().split()) == 1, "run once"


def test_a_killed_worker_leaves_its_cell_to_the_next(tmp_path: Path) -> None:
    folder, process = CellFolder(tmp_path), started(worker, tmp_path, 600, 600)
    first = in_order(many())[0]
    while not (folder.of(first) / "ran").exists():
        assert process.is_alive()
        time.sleep(0.02)
    assert state(first, folder) == "running"
    process.kill()
    process.join()
    assert state(first, folder) == "begun"
    assert sorted(run_all(many(), folder)) == sorted(cell.name for cell in many())
