"""Lightning under its other name: the package `lightning`, whose classes are not those of `pytorch_lightning`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import SITE, TRAIT, Module, learner, loader, make_plan, make_tracker, n_hooks, only, vector
from callback_helpers import make_trainer as make_trainer_of_pl
from families import FAMILIES

from steer.callbacks import DriftCallback, SteeringCallback
from steer.intervene import Plan

L = pytest.importorskip("lightning", reason="the package `lightning` is not installed; pytorch_lightning is").pytorch
pytestmark = pytest.mark.filterwarnings("ignore")


class SameModule(L.LightningModule):
    """`Module`, of the other package."""

    def __init__(self, in_configure_model: bool = False) -> None:
        super().__init__()
        self.model = None if in_configure_model else FAMILIES["llama"]()
        self.losses: list[float] = []

    training_step = Module.training_step
    loss = Module.loss
    configure_optimizers = Module.configure_optimizers


class Configured(SameModule):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = FAMILIES["llama"]()


def make_trainer(*callbacks: Any, **options: Any) -> Any:
    saves = any(isinstance(callback, L.callbacks.ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_checkpointing": saves, **quiet},
        callbacks=list(callbacks),
        **options,
    )


def callbacks() -> tuple[SteeringCallback, DriftCallback]:
    return SteeringCallback(learner(), learning_rate=0.1), DriftCallback(make_tracker(), every_n_steps=4)


def test_a_callback_is_one_of_both_packages() -> None:
    for callback in callbacks():
        assert isinstance(callback, pl.Callback) and isinstance(callback, L.Callback)


@pytest.mark.parametrize("module", [SameModule, lambda: Configured(in_configure_model=True)], ids=["in __init__", "in configure_model"])
def test_training_is_that_of_the_other_package(tmp_path: Path, module: Any) -> None:
    runs = []
    for trainer, made in ((make_trainer_of_pl, Module()), (make_trainer, module())):
        steering, drift = callbacks()
        trainer(steering, drift).fit(made, loader())
        runs.append((made.losses, only(steering.plan).tolist(), drift._run.values))
        assert n_hooks(made) == 0
    assert runs[0] == runs[1] and len(runs[0][0]) == 8


def test_the_model_is_found_complete_at_setup() -> None:
    from steer.callbacks.lightning import is_complete

    assert is_complete(SameModule()) and not is_complete(Configured()) and is_complete(Module())


def test_checkpoints_and_monitors(tmp_path: Path) -> None:
    steering, drift = callbacks()
    best = L.callbacks.ModelCheckpoint(tmp_path, monitor=f"{TRAIT}/effect_sd", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    make_trainer(steering, drift, best).fit(SameModule(), loader())
    assert {Path(path).name for path in best.best_k_models} == {"step=4.ckpt", "step=8.ckpt"}
    again, tracked = callbacks()
    make_trainer(again, tracked, max_steps=8).fit(SameModule(), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert tracked.tracker.last_step == 8 and float(only(again.plan).norm()) > 0


def plan_of_the_command_line(strength: float = 1.0) -> Plan:
    return make_plan(strength=strength)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_command_line_takes_a_callback_by_its_class_path(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    cli = pytest.importorskip(f"{package}.cli")
    make_plan().save(tmp_path / "plan")
    plan = {"class_path": "steer.Plan.load", "init_args": {"path": str(tmp_path / "plan")}}
    monkeypatch.chdir(tmp_path)
    config = {"max_steps": 1, "logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}
    steering = {"class_path": "steer.callbacks.SteeringCallback", "init_args": {"plan": plan, "phases": ["train"]}}
    module = Module if package == "pytorch_lightning" else SameModule
    made = cli.LightningCLI(module, args={"trainer": {**config, "callbacks": [steering]}}, run=False, save_config_callback=None)
    made.trainer.fit(made.model, loader())
    (callback,) = (callback for callback in made.trainer.callbacks if isinstance(callback, SteeringCallback))
    assert callback.attachment.fired() == {f"add@{SITE}": 10} and torch.equal(
        next(iter(callback.plan.interventions[0].operator.tensors.values())).flatten(), vector()
    )
    misspelt = {**steering, "init_args": {"plan": plan, "phase": ["train"]}}
    with pytest.raises(SystemExit):
        cli.LightningCLI(module, args={"trainer": {**config, "callbacks": [misspelt]}}, run=False, save_config_callback=None)
    errors = capsys.readouterr().err  # what the guide says of it: the entry to read comes first
    assert errors.index("Option 'phase' is not accepted") < errors.index("Expected a <class 'NoneType'>")
