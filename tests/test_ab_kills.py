"""`steer ab` under kill -9: whatever it was doing, the same command goes on from there and finds the same to the bit."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked_steer
import pytest
from experiment_helpers import command, read_metrics, without_times
from safetensors.torch import load_file
from tiny_experiment import SMALL, ab_overrides, write_data, write_model

from steer.drift.store import DriftStore
from steer.experiment.result import Result

# behind what a process is killed, and the longest while, in times that a cell takes
LONGEST = {"start": 1.3, "a cell": 1.3, "a checkpoint": 0.1, "all cells": 0.5}
FEW = ["a cell", "a checkpoint", "a checkpoint", "all cells"]
MANY = ["start"] * 2 + ["a cell"] * 14 + ["a checkpoint"] * 2 + ["all cells"] * 2
CELLS_OF_A_SEED = 5  # plain, preventative, two draws of random, inference


def arguments(parts: Path, folder: Path, seeds: int) -> list[str]:
    few = [*SMALL, "experiment.arms.prompt=null", "experiment.train.steps=6", "experiment.train.checkpoint_every=1"]
    return ["ab", *ab_overrides(parts / "model", parts / "data", folder, *few, f"seeds={list(range(seeds))}")]


def names(folder: Path, pattern: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.glob(f"cells/*/{pattern}")}


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.is_alive(), f"it was to be killed, and ended with {process.exitcode}"
        time.sleep(0.005)


def where(folder: Path, leases: set[str], cells: int) -> str:
    """What a process that was killed was doing."""
    done = {Path(name).parent for name in names(folder, "done.json")}
    if len(done) == cells:
        return "page"
    if not (begun := names(folder, "lease.*.json") - leases):
        return "start"
    if not (open_cells := {Path(name).parent for name in begun} - done):
        return "between"
    cell = folder / open_cells.pop()
    return "measuring" if list(cell.glob("adapter/*.safetensors")) else "training" if (cell / "logs").is_dir() else "beginning"


def found(folder: Path) -> tuple[object, ...]:
    """All that must not depend on interruptions."""
    drift = {}
    for file in sorted(folder.glob("cells/*/drift.sqlite")):
        with DriftStore(file) as store:
            drift[file.parent.name] = [str(record) for record in store.records()]
    weights = {
        file.parents[1].name: {name: tensor.tolist() for name, tensor in load_file(file).items()}
        for file in folder.glob("cells/*/adapter/adapter_model.safetensors")
    }
    return without_times(read_metrics(folder)), (folder / "scores.parquet").read_bytes(), drift, weights


@pytest.mark.parametrize(
    ("kills", "seeds"),
    [
        (FEW, 1),
        pytest.param(MANY, 4, marks=pytest.mark.slow),
    ],
    ids=["few", "many"],
)
def test_killed_at_random_points_it_finds_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[str], seeds: int
) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Result, "report", lambda result, path: path)
        started = time.perf_counter()
        assert command(*arguments(tmp_path, tmp_path / "whole", seeds)) == 0
    cells = 1 + seeds * CELLS_OF_A_SEED
    a_cell = (time.perf_counter() - started) / cells
    folder, chance, killed = tmp_path / "killed", random.Random(0), Counter[str]()
    for behind in kills:
        leases, written = names(folder, "lease.*.json"), names(folder, "checkpoints/*.ckpt")
        process = forked_steer.start(arguments(tmp_path, folder, seeds))
        happened = {
            "start": lambda: True,
            "a cell": lambda leases=leases: bool(names(folder, "lease.*.json") - leases),
            "a checkpoint": lambda written=written: bool(names(folder, "checkpoints/*.ckpt") - written),
            "all cells": lambda: len(names(folder, "done.json")) == cells,
        }
        wait_for(process, happened[behind])
        until = time.perf_counter() + chance.random() * LONGEST[behind] * a_cell
        wait_for(process, lambda until=until: time.perf_counter() >= until)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed[where(folder, leases, cells)] += 1
    assert killed["training"] + killed["measuring"] >= 1 <= killed["page"], killed  # which of both depends on how fast the machine is
    process = forked_steer.start(arguments(tmp_path, folder, seeds))
    process.join()
    assert process.exitcode == 0 and (folder / "report.html").is_file()
    for ours, theirs in zip(found(folder), found(tmp_path / "whole"), strict=True):
        assert ours == theirs
