"""Cells on two processes, by torchrun or accelerate, under DDP or FSDP2: the same scores, losses, adapters and drift as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, without_times
from processes import run_on_ranks
from safetensors.torch import load_file
from tiny_experiment import OVERRIDES, SMALL, write_data, write_model

from steer.commands import experiment_run
from steer.drift.store import DriftStore

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
PLAN = "2 gushing:layers.1.output@response"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
KILLED = Path(__file__).parent / "killed_at_a_step.py"
Parts = tuple[Path, Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


@pytest.fixture(scope="module")
def one(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small experiment in one process."""
    folder = tmp_path_factory.mktemp("one") / "folder"
    assert command("ab", *arguments(parts, folder)) == 0
    return folder


def arguments(parts: Parts, folder: Path, *more: str) -> list[str]:
    return [
        *(f"model.name={parts[0]}", f"experiment.data={parts[1]}", f"folder={folder}", "seeds=[0]", "draws=1"),
        *(*OVERRIDES, *SMALL, "experiment.train.checkpoint_every=1"),
        *(f"experiment.arms.preventative.treatment.plan='{PLAN}'", "experiment.arms.inference=null", "experiment.arms.prompt=null"),
        *more,
    ]


def run_ranks(parts: Parts, folder: Path, strategy: str, *launcher: str, program: tuple[str, ...] = ("-m", "steer.cli")) -> Any:
    line = [sys.executable, *launcher, *program, "ab", *arguments(parts, folder, f"trainer.strategy={strategy}")]
    return subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)


def run_forked_ranks(parts: Parts, folder: Path, strategy: str) -> None:
    """The same ranks with the environment that torchrun gives them, in processes that need not import torch again."""
    run_on_ranks(_steer, arguments(parts, folder, f"trainer.strategy={strategy}"))


def _steer(words: list[str]) -> None:
    assert command("ab", *words) == 0


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def scores(folder: Path) -> dict[tuple[str, ...], float]:
    """By cell, outcome and item."""
    found = {}
    for file in folder.glob("cells/*/done.json"):
        for outcome, values in json.loads(file.read_text())["result"]["scores"].items():
            found |= {(file.parent.name, outcome, item): value for item, value in values.items()}
    return found


def adapters(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    files = folder.glob("cells/*/adapter/adapter_model.safetensors")
    return {(file.parents[1].name, name): tensor for file in files for name, tensor in load_file(file).items()}


def drift(folder: Path) -> dict[tuple[Any, ...], float]:
    values = {}
    for cell, name in read(folder)["drift"]["stores"].items():
        with DriftStore(folder / name) as store:
            for record in store.records():
                key = (cell, record.step, record.mode, record.direction, str(record.site), record.kind)
                values |= {(*key, metric): value for metric, value in record.metrics.items() if value is not None and metric == "mean"}
    return values


def assert_same_experiment(folder: Path, one: Path) -> None:
    """To rounding; the cells are the same ones."""
    ours, theirs = read(folder), read(one)
    assert list(ours["cells"]) == list(theirs["cells"])
    assert len(scores(one)) > 10 and scores(folder) == pytest.approx(scores(one), abs=1e-6)
    for cell, training in theirs["training"].items():
        assert ours["training"][cell]["loss"] == pytest.approx(training["loss"], abs=2e-6) and len(training["loss"]) == 3
    assert len(drift(one)) > 10 and drift(folder) == pytest.approx(drift(one), rel=1e-6, abs=1e-6)
    whole, mine = adapters(one), adapters(folder)
    assert mine.keys() == whole.keys() and len(whole) > 3
    assert max(float((mine[key] - tensor).abs().max()) for key, tensor in whole.items()) < 1e-6
    assert not list(folder.glob("cells/*/checkpoints*"))


@pytest.mark.parametrize(
    ("strategy", "launcher"),
    [("fsdp2", TORCHRUN), ("ddp", None), pytest.param("ddp_find_unused_parameters_true", ACCELERATE, marks=pytest.mark.slow)],
    ids=["torchrun-fsdp2", "ddp", "accelerate-ddp"],
)
def test_two_processes_find_what_one_finds(
    parts: Parts, one: Path, tmp_path: Path, strategy: str, launcher: tuple[str, ...] | None
) -> None:
    if launcher is None:
        run_forked_ranks(parts, tmp_path / "two", strategy)
    else:
        done = run_ranks(parts, tmp_path / "two", strategy, *launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_experiment(tmp_path / "two", one)


@pytest.mark.slow
def test_sharded_processes_go_on_after_a_kill(parts: Parts, one: Path, tmp_path: Path) -> None:
    whole = run_ranks(parts, tmp_path / "whole", "fsdp2", *TORCHRUN)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "killed"
    killed = run_ranks(parts, folder, "fsdp2", *TORCHRUN, program=(str(KILLED), "2"))
    assert killed.returncode != 0 and not (folder / "metrics.json").exists()
    checkpoints = sorted(file.name for file in folder.glob("cells/plain*/checkpoints.fsdp2/*.ckpt"))
    assert checkpoints == ["step=1.ckpt", "step=2.ckpt"], killed.stderr[-3000:]
    resumed = run_ranks(parts, folder, "fsdp2", *TORCHRUN)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert scores(folder) == scores(tmp_path / "whole")  # to the bit
    assert without_times(read(folder)["training"]) == without_times(read(tmp_path / "whole")["training"])
    assert_same_experiment(folder, one)


def test_a_cell_that_was_begun_sharded_is_begun_again_in_one_process(parts: Parts, one: Path, tmp_path: Path) -> None:
    """Its checkpoints number the optimiser's state in another way."""
    folder = tmp_path / "f"
    cell = next(cell for cell in read(one)["cells"] if cell.startswith("plain"))
    (folder / "cells" / cell / "checkpoints.fsdp2").mkdir(parents=True)
    (folder / "cells" / cell / "checkpoints.fsdp2" / "step=2.ckpt").write_bytes(b"of two ranks")
    assert command("ab", *arguments(parts, folder)) == 0
    assert scores(folder) == scores(one)
    assert not list(folder.glob("cells/*/checkpoints*"))


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("trainer.strategy=fsdp3", ("strategy 'fsdp3'", "did you mean 'fsdp2'")),
        ("trainer.strategy=null", ("strategy 'None'", "trainer.strategy=ddp")),
        ("trainer.strategy=fsdp", ("strategy 'fsdp'", "trainer.strategy=fsdp2")),
        ("trainer.strategy=deepspeed_stage_3", ("strategy 'deepspeed_stage_3'", "trainer.strategy=fsdp2")),
        ("trainer.strategy=ddp_spawn", ("strategy 'ddp_spawn'", "trainer.strategy=ddp, under torchrun")),
        ("trainer.devices=2", ("needs a process for each", "means 2 devices", "torchrun --nproc-per-node 2 -m steer.cli ab")),
        ("trainer.devices=0", ("no cell can be trained like this here", "devices=0")),
        ("trainer.accelerator=gpv", ("no cell can be trained like this here", "accelerator=gpv")),
        ("trainer.precision=31-true", ("no cell can be trained like this here", "precision=31-true")),
    ],
)
def test_what_cannot_train_a_cell_is_said_before_a_model_is_loaded(
    parts: Parts, tmp_path: Path, override: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment_run, "load", lambda *_, **__: pytest.fail("no model is loaded for this"))
    assert command("ab", *arguments(parts, tmp_path / "f", override)) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: ") and "remedy: " in err and all(name in err for name in names), err
    assert not (tmp_path / "f" / "cells").exists()
