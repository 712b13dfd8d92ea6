"""`tracker=`: a run for each cell, with its losses and the means of its outcomes, grouped by experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from experiment_helpers import command, read_metrics
from tiny_experiment import SMALL, ab_overrides, write_data, write_model

from steer.experiment.result import Result

FEW = [*SMALL, "experiment.arms.prompt=null", "experiment.arms.random=null", "experiment.primary=null", "seeds=[0]"]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)


@pytest.fixture
def tracked(tmp_path: Path) -> Any:
    """Runs three arms with a tracker; the mean of every trained arm as metrics.json has it."""

    def run(*more: str) -> tuple[Path, dict[str, float]]:
        folder = tmp_path / "folder"
        parts = write_model(tmp_path / "model"), write_data(tmp_path / "data")
        assert command("ab", *ab_overrides(*parts, folder, *FEW), *more) == 0
        metrics = read_metrics(folder)
        assert {cell["arm"] for cell in metrics["cells"].values()} == {"base", "plain", "preventative", "inference"}
        return folder, {arm["name"]: arm["outcomes"]["behaviour_gap"]["mean"] for arm in metrics["arms"]}

    return run


def test_tensorboard(tracked: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, means = tracked("tracker=tensorboard")
    runs = {path.name.split(".")[0]: path for path in (folder / "tensorboard" / "tone").iterdir()}
    assert set(runs) == {"plain", "preventative", "inference"}
    for arm, path in runs.items():
        events = EventAccumulator(str(path)).Reload()
        assert events.Scalars("outcome/behaviour_gap")[-1].value == pytest.approx(means[arm], rel=1e-6)
        assert ("train/loss" in events.Tags()["scalars"]) == (arm != "inference"), "the weights of another arm are not trained again"
    assert [event.step for event in EventAccumulator(str(runs["plain"])).Reload().Scalars("train/loss")] == [0, 1, 2]


def test_mlflow(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder, means = tracked("tracker=mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tone").experiment_id])
    assert {run.data.tags["arm"] for run in runs} == {"plain", "preventative", "inference"}
    for run in runs:
        assert run.data.metrics["outcome/behaviour_gap"] == pytest.approx(means[run.data.tags["arm"]], rel=1e-6)
        assert run.info.status == "FINISHED"


def test_wandb(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    begun: list[dict[str, Any]] = []
    real = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options) or real(**options))
    folder, _ = tracked("tracker=wandb", "tracker.mode=offline")
    assert [run["job_type"] for run in begun] == ["plain", "preventative", "inference"]
    assert {run["group"] for run in begun} == {"tone"} and len({run["name"] for run in begun}) == 3
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 3, "one run is closed before the next begins"
