"""DriftCallback under a real pytorch_lightning Trainer."""

from __future__ import annotations

import csv
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import (
    PROMPT,
    ROWS,
    SITE,
    TOKENS,
    TRAIT,
    Module,
    OwnLoss,
    loader,
    make_plan,
    make_tracker,
    make_trainer,
    n_hooks,
    same_weights,
)
from drift.drift_helpers import direction, features
from families import FAMILIES
from torch import Tensor

from steer.callbacks import DriftCallback, SteeringCallback
from steer.drift import DriftRecord, DriftStore, DriftTracker
from steer.errors import ConfigError
from steer.model.watcher import watcher_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
RESPONSE = ROWS * (TOKENS - PROMPT)  # response tokens of one epoch


def records(path: Path) -> list[DriftRecord]:
    with DriftStore(path) as store:
        return store.records()


def steps(path: Path, mode: str = "probe") -> list[int]:
    return sorted({record.step for record in records(path) if record.mode == mode})


@pytest.fixture(scope="module")
def plain() -> Module:
    """One epoch without any callback."""
    module = Module()
    make_trainer().fit(module, loader())
    return module


# ---- when it measures


def test_measures_before_the_first_step_then_every_n_optimiser_steps_and_at_the_end(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path / "d.sqlite")
    make_trainer(DriftCallback(tracker, every_n_steps=3), accumulate_grad_batches=2, max_epochs=2).fit(Module(), loader())
    assert steps(tmp_path / "d.sqlite") == [0, 3, 6, 8]
    assert steps(tmp_path / "d.sqlite", "stream") == [3, 6, 8]


def test_stream_windows_hold_every_training_token_once_and_no_other(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path / "d.sqlite")
    trainer = make_trainer(DriftCallback(tracker, every_n_steps=2), num_sanity_val_steps=2, val_check_interval=2)
    trainer.fit(Module(), loader(), loader())
    counts = {record.step: record.n for record in records(tmp_path / "d.sqlite") if record.mode == "stream"}
    assert counts == {step: RESPONSE // 4 for step in (2, 4, 6, 8)}


def test_training_is_the_same_to_the_bit(plain: Module, tmp_path: Path) -> None:
    module = Module()
    make_trainer(DriftCallback(make_tracker(tmp_path / "d.sqlite"), every_n_steps=2)).fit(module, loader())
    assert module.losses == plain.losses and same_weights(module, plain)
    assert n_hooks(module) == 0 and watcher_of(module) is None


def test_stream_mode_when_the_module_computes_its_own_loss(tmp_path: Path) -> None:
    make_trainer(DriftCallback(make_tracker(tmp_path / "a.sqlite"), every_n_steps=4)).fit(OwnLoss(), loader())
    make_trainer(DriftCallback(make_tracker(tmp_path / "b.sqlite"), every_n_steps=4)).fit(Module(), loader())
    own, labelled = (
        [(record.n, record.mean) for record in records(tmp_path / name) if record.mode == "stream"] for name in ("a.sqlite", "b.sqlite")
    )
    assert [n for n, _ in own] == [n for n, _ in labelled] and len(own) == 10
    assert [mean for _, mean in own] == pytest.approx([mean for _, mean in labelled], rel=1e-4, abs=1e-6)


def test_after_a_steering_callback_the_stream_is_read_as_steered_and_the_probe_is_not() -> None:
    means = {}
    for name, strength in (("off", 0.0), ("on", 2.0)):
        tracker = DriftTracker({"trait": direction("layers.1.output", seed=3)}, probe=make_tracker().probe.prompts)
        make_trainer(SteeringCallback(make_plan(strength=strength)), DriftCallback(tracker, every_n_steps=1), max_steps=1).fit(
            Module(), loader()
        )
        means[name] = {record.mode: record.mean for record in tracker.latest if record.kind == "named"}
        means[name]["baseline"] = float(tracker.probe.baseline["layers.1.output"].sum())
    # the plan's vector has length 2 and the direction's seed
    assert means["on"]["stream"] - means["off"]["stream"] == pytest.approx(2.0 * 2.0, rel=0.01)
    assert means["on"]["baseline"] == means["off"]["baseline"]


def test_training_after_validation_in_inference_mode() -> None:
    tracker, module = make_tracker(), Module()
    trainer = make_trainer(DriftCallback(tracker, every_n_steps=4))
    trainer.validate(module, loader(), verbose=False)
    assert tracker.last_step == -1
    trainer.fit(module, loader())
    assert tracker.last_step == 8


def test_a_model_that_is_made_in_configure_model() -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(1, 1))
            self.model = None

        def configure_model(self) -> None:
            self.model = self.model or FAMILIES["llama"]()

    tracker, early = make_tracker(), make_tracker()
    make_trainer(DriftCallback(tracker)).fit(Late(), loader())
    make_trainer(DriftCallback(early)).fit(Module(), loader())
    assert [astuple(record) for record in tracker.latest] == [astuple(record) for record in early.latest]


# ---- where the numbers go


def test_checkpoints_are_chosen_by_drift(tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=f"{TRAIT}/effect_sd", mode="max", every_n_train_steps=2, filename="{step}")
    tracker = make_tracker(tmp_path / "d.sqlite")
    make_trainer(DriftCallback(tracker, every_n_steps=2), best).fit(Module(), loader())
    named = [record for record in records(tmp_path / "d.sqlite") if record.kind == "named" and record.mode == "probe"]
    effects = {record.step: record.effect_sd for record in named if record.step > 0}
    step = max(effects, key=lambda step: effects[step])
    assert best.best_model_path.endswith(f"step={step}.ckpt")
    assert float(best.best_model_score) == pytest.approx(effects[step], rel=1e-6)


def test_a_monitor_that_asks_before_the_first_regular_measurement(tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=f"{TRAIT}/effect_sd", every_n_train_steps=1)
    make_trainer(DriftCallback(make_tracker(), every_n_steps=100), best, limit_train_batches=2).fit(Module(), loader())
    assert float(best.best_model_score) == 0.0  # the baseline's


def test_a_monitor_that_asks_after_a_resume_and_before_the_next_measurement(tmp_path: Path) -> None:
    def run(save: pl.callbacks.ModelCheckpoint, **options: Any) -> DriftCallback:
        callback = DriftCallback(make_tracker(), every_n_steps=2)
        make_trainer(callback, save, max_steps=options.pop("max_steps")).fit(Module(), loader(), **options)
        return callback

    first = run(pl.callbacks.ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2), max_steps=2)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=f"{TRAIT}/effect_sd", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run(best, max_steps=4, ckpt_path=tmp_path / "two.ckpt")
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    assert scores["step=3.ckpt"] == pytest.approx(first._run.values[f"{TRAIT}/effect_sd"], rel=1e-6)
    assert scores["step=4.ckpt"] != scores["step=3.ckpt"]


def test_early_stopping_by_drift() -> None:
    stop = pl.callbacks.EarlyStopping(f"{TRAIT}/effect_sd", stopping_threshold=-1e9, mode="max", check_on_train_epoch_end=True)
    trainer = make_trainer(DriftCallback(make_tracker(), every_n_steps=2), stop, max_epochs=5)
    trainer.fit(Module(), loader())
    assert stop.stopped_epoch == 0 and trainer.global_step == 8


def test_a_monitor_that_looks_where_nothing_was_measured() -> None:
    """Epochs of two steps, a measurement every four: the patience of EarlyStopping would count the old value."""
    with pytest.warns(UserWarning, match="read after step 2, and was measured after step 0") as caught:
        stop = pl.callbacks.EarlyStopping(f"{TRAIT}/effect_sd", patience=9)
        make_trainer(DriftCallback(make_tracker(), every_n_steps=4), stop, limit_train_batches=2, max_epochs=4).fit(Module(), loader())
    assert sum("takes the old value" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a monitor takes the old value")
        for watching, every in ((stop, 2), (pl.callbacks.EarlyStopping("loss", strict=False), 4)):
            callback = DriftCallback(make_tracker(), every_n_steps=every)
            make_trainer(callback, watching, limit_train_batches=2, max_epochs=2).fit(Module(), loader())


def test_a_feature_and_a_dictionary_are_monitored_like_a_direction(tmp_path: Path) -> None:
    monitor = f"drift/warm/5/{SITE}/density"
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=monitor, mode="max", every_n_train_steps=2, filename="{step}")
    stop = pl.callbacks.EarlyStopping(f"drift/warm/{SITE}/fvu_change", stopping_threshold=-1e9, mode="max", check_on_train_epoch_end=True)
    tracker = make_tracker(tmp_path / "d.sqlite", features=features())
    trainer = make_trainer(DriftCallback(tracker, every_n_steps=2), best, stop, max_epochs=5)
    trainer.fit(Module(), loader())
    assert trainer.global_step == 8
    of_feature = [record for record in records(tmp_path / "d.sqlite") if record.direction == "warm/5"]
    densities = {record.step: record.density for record in of_feature if record.mode == "probe"}
    assert float(best.best_model_score) == pytest.approx(max(densities[step] for step in (2, 4, 6, 8)))
    assert {record.mode for record in of_feature} == {"probe", "stream"}


def test_every_measurement_is_logged_at_its_own_step(tmp_path: Path) -> None:
    logger, tracker = pl.loggers.CSVLogger(tmp_path, name="", version=""), make_tracker(tmp_path / "d.sqlite")
    make_trainer(DriftCallback(tracker, every_n_steps=3), logger=logger, log_every_n_steps=50).fit(Module(), loader())
    rows = {int(row["step"]): row for row in csv.DictReader((tmp_path / "metrics.csv").open())}
    assert sorted(rows) == [0, 3, 6, 8]
    effects = {
        record.step: record.effect_sd for record in records(tmp_path / "d.sqlite") if record.kind == "named" and record.mode == "probe"
    }
    assert {step: float(row[f"{TRAIT}/effect_sd"]) for step, row in rows.items()} == pytest.approx(effects)


# ---- kill and resume


def test_a_killed_and_resumed_run_leaves_the_records_of_the_uninterrupted_one(tmp_path: Path) -> None:
    class Dies(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if self.global_step == 6:
                raise MemoryError("killed")
            return super().training_step(batch, index)

    def run(module: Module, name: str, **options: Any) -> DriftCallback:
        callback = DriftCallback(make_tracker(tmp_path / f"{name}.sqlite"), every_n_steps=3)
        save = pl.callbacks.ModelCheckpoint(tmp_path, filename=name, enable_version_counter=False)
        make_trainer(callback, save, max_epochs=2, accumulate_grad_batches=2).fit(module, loader(), **options)
        return callback

    with pytest.raises(MemoryError):
        run(Dies(), "killed")
    assert steps(tmp_path / "killed.sqlite") == [0, 3, 6]  # the checkpoint is from step 4
    resumed = run(Module(), "killed", ckpt_path=tmp_path / "killed.ckpt")
    uninterrupted = run(Module(), "whole")
    assert [astuple(record) for record in records(tmp_path / "killed.sqlite")] == [
        astuple(record) for record in records(tmp_path / "whole.sqlite")
    ]
    ours, theirs = resumed.state_dict(), uninterrupted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_records_without_their_state_are_not_continued(tmp_path: Path) -> None:
    tracked = make_trainer(DriftCallback(make_tracker(tmp_path / "d.sqlite")), max_steps=2)
    tracked.fit(Module(), loader())
    bare = make_trainer(max_steps=2)
    bare.fit(Module(), loader())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    module, resume = Module(), {"train_dataloaders": loader(), "ckpt_path": tmp_path / "bare.ckpt"}
    with pytest.raises(ConfigError, match="holds no drift state"):
        make_trainer(DriftCallback(make_tracker(tmp_path / "d.sqlite")), max_steps=4).fit(module, **resume)
    assert n_hooks(module) == 0
    with pytest.warns(UserWarning, match="after step 2"):
        make_trainer(DriftCallback(make_tracker(tmp_path / "new.sqlite")), max_steps=4).fit(Module(), **resume)
    assert steps(tmp_path / "new.sqlite") == [2, 4]


def test_a_tracker_of_another_run_is_refused() -> None:
    tracker, module = make_tracker(), Module()
    make_trainer(DriftCallback(tracker), max_steps=2).fit(Module(), loader())
    with pytest.raises(ConfigError, match="another run"):
        make_trainer(DriftCallback(tracker), max_steps=2).fit(module, loader())
    assert n_hooks(module) == 0


def test_a_state_of_other_directions_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(DriftCallback(make_tracker()), max_steps=2)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="another tracker"):
        make_trainer(DriftCallback(make_tracker(seed=1)), max_steps=4).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")


# ---- more than one, and none left behind


def test_two_callbacks_keep_their_own_state(tmp_path: Path) -> None:
    probe, stream = make_tracker(stream=False), make_tracker(probe=None)
    trainer = make_trainer(DriftCallback(probe, every_n_steps=2), DriftCallback(stream, every_n_steps=4), max_steps=5)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]) == 2
    again = make_tracker(stream=False), make_tracker(probe=None)
    make_trainer(*map(DriftCallback, again), max_steps=6).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert again[0].probe.baseline.keys() == probe.probe.baseline.keys() and again[0].last_step == 6


def test_an_exception_takes_the_hooks_off_and_closes_the_store(tmp_path: Path) -> None:
    module = Module()

    def fail(*_: Any) -> None:
        raise ValueError("stop")

    module.on_before_zero_grad = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="stop"):
        make_trainer(DriftCallback(make_tracker(tmp_path / "d.sqlite"))).fit(module, loader())
    assert n_hooks(module) == 0
    tracker = make_tracker(tmp_path / "d.sqlite")
    make_trainer(DriftCallback(tracker), max_steps=1).fit(Module(), loader())  # another writer may open it
    assert steps(tmp_path / "d.sqlite") == [0, 1]


def test_bad_interval() -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        DriftCallback(make_tracker(), every_n_steps=0)


def test_gradient_checkpointing_counts_tokens_once(tmp_path: Path) -> None:
    module = Module()
    module.model.train().activation_checkpointing_enable({"use_reentrant": False})
    make_trainer(DriftCallback(make_tracker(tmp_path / "d.sqlite"), every_n_steps=8)).fit(module, loader())
    assert {record.n for record in records(tmp_path / "d.sqlite") if record.mode == "stream"} == {RESPONSE}
