"""Processes that share the cells of an experiment: the same page, each cell once, nothing left running."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, read_metrics, without_times
from pronoun_data import write_splits
from tiny_experiment import ab_overrides, write_data, write_model

from steer.commands import ab, further_processes
from steer.commands.experiment_config import ExperimentConfig
from steer.commands.experiment_run import ExperimentRun
from steer.experiment.cells import CellFolder
from steer.experiment.result import Result

ARMS = [
    "experiment.arms.gates.treatment.settings.steps=2",
    "experiment.arms.gates.doses=[1]",
    "experiment.arms.projection.treatment.options.site=layers.1.output",
    *(
        f"experiment.arms.{name}=null"
        for name in ("heads", "random_heads", "baked", "leace", "inlp", "sentence_debias", "self_debias", "cda")
    ),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    model, data = write_model(folder / "model"), write_splits(folder / "data")
    return [f"model.name={model}", f"experiment.data={data}", "experiment.circuit.baseline=game", "trainer.accelerator=cpu", *ARMS]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)


@pytest.fixture(scope="module")
def alone(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Result, "report", lambda result, path: path)
        assert command("bias", *parts, f"folder={folder}", "processes=1") == 0
    return folder


def comparable(folder: Path) -> Any:
    metrics = read_metrics(folder)
    metrics["config"].pop("processes", None)
    return without_times(metrics)


def test_two_processes_write_the_page_of_one(parts: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    prepare = ExperimentRun.prepare

    def when_the_other_has_begun(job: ExperimentRun, **options: Any) -> None:
        """The other process takes what needs no circuit while this one makes the circuits."""
        (worker,) = multiprocessing.active_children()
        while not list((tmp_path / "cells").glob("projection*/done.json")):
            worker.join(0.1)
            assert worker.exitcode is None
        prepare(job, **options)

    monkeypatch.setattr(ExperimentRun, "prepare", when_the_other_has_begun)
    assert command("bias", *parts, f"folder={tmp_path}", "processes=2") == 0
    assert comparable(tmp_path) == comparable(alone)
    holders = {json.loads(file.read_text())["pid"] for file in tmp_path.glob("cells/projection*/lease.*.json")}
    assert len(holders) == 1 and os.getpid() not in holders
    assert not multiprocessing.active_children() and torch.get_num_threads() == threads


def test_what_is_not_ready_is_left_to_the_first(parts: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[ExperimentRun] = []
    monkeypatch.setattr(ab, "run_all", jobs.append)
    assert command("bias", *parts, f"folder={tmp_path}", "processes=1") == 0
    (job,) = jobs
    cells = CellFolder(tmp_path / "cells")

    def ready() -> set[str]:
        return {cell.arm for cell in job.config.cells() if further_processes._is_ready(job, cell, cells)}

    assert ready() == {"prompt", "projection"}
    (base,) = alone.glob("cells/base*")
    shutil.copytree(base, tmp_path / "cells" / base.name)
    assert ready() == {"prompt", "projection", "plain"}
    shutil.copytree(alone / "circuits", tmp_path / "circuits")
    assert ready() == {"prompt", "projection", "plain", "gates x1", "random_gates"}


def test_a_fault_of_the_first_ends_the_others(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: ExperimentRun, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExperimentRun, "prepare", fails)
    assert command("bias", *parts, f"folder={tmp_path}", "processes=3") == 130
    assert not multiprocessing.active_children()


def test_arms_that_are_trained_are_spread_by_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ab_overrides(write_model(tmp_path / "model"), write_data(tmp_path / "data"), tmp_path / "f")
    assert command("ab", *arguments, "processes=2") == 2
    assert "cannot share the cells of an experiment that trains" in capsys.readouterr().err
    assert command("ab", *arguments, "processes=0") == 2
    assert "processes" in capsys.readouterr().err


def test_by_itself_two_where_there_are_threads_for_them(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[ExperimentRun] = []
    monkeypatch.setattr(ab, "run_all", jobs.append)
    assert command("bias", *parts, f"folder={tmp_path}") == 0
    config: ExperimentConfig = jobs[0].config
    monkeypatch.setattr(further_processes.multiprocessing, "get_context", lambda how: Started)
    for threads, expected in {1: 0, 2: 1, 8: 1}.items():
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        Started.threads.clear()
        with further_processes.further_processes(config, tmp_path):
            assert Started.threads == [threads // 2] * expected


class Started:
    """In place of a process."""

    threads: list[int] = []  # noqa: RUF012 - of all that were started
    pid = None

    @classmethod
    def Process(cls, target: Any, args: tuple[Any, ...], daemon: bool) -> Started:  # noqa: N802 - as multiprocessing has it
        cls.threads.append(args[-1])
        return cls()

    def start(self) -> None:
        """Nothing runs."""
