"""Cells on two processes of torchrun: the same scores, losses and drift as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, read_metrics
from tiny_experiment import OVERRIDES, SMALL, write_data, write_model

from steer.drift.store import DriftStore

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
PLAN = "2 gushing:layers.1.output@response"


def run_ab(folder: Path, model: Path, data: Path, processes: int) -> dict[str, Any]:
    """metrics.json of a small experiment, in this process or in those of torchrun."""
    arguments = [
        *(f"model.name={model}", f"experiment.data={data}", f"folder={folder}", "seeds=[0]", "draws=1"),
        *(*OVERRIDES, *SMALL),
        *(f"experiment.arms.preventative.treatment.plan='{PLAN}'", "experiment.arms.inference=null", "experiment.arms.prompt=null"),
    ]
    if processes == 1:
        assert command("ab", *arguments) == 0
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "steer.cli", "ab", *arguments]
        done = subprocess.run(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(folder)


def drift(folder: Path, metrics: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    values = {}
    for cell, name in metrics["drift"]["stores"].items():
        with DriftStore(folder / name) as store:
            for record in store.records():
                key = (cell, record.step, record.mode, record.direction, str(record.site), record.kind)
                values |= {(*key, metric): value for metric, value in record.metrics.items() if value is not None and metric == "mean"}
    return values


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    one, two = (run_ab(tmp_path / str(processes), model, data, processes) for processes in (1, 2))
    assert list(one["cells"]) == list(two["cells"])
    for arm, same in zip(one["arms"], two["arms"], strict=True):
        for outcome, values in arm["outcomes"].items():
            assert same["outcomes"][outcome]["by_seed"] == pytest.approx(values["by_seed"], abs=1e-6)
    for cell, training in one["training"].items():
        assert two["training"][cell]["loss"] == pytest.approx(training["loss"], abs=2e-6) and len(training["loss"]) == 3
    of_one, of_two = drift(tmp_path / "1", one), drift(tmp_path / "2", two)
    assert len(of_one) > 10 and of_two == pytest.approx(of_one, rel=1e-6, abs=1e-6)
