"""HFSteeringCallback and HFDriftCallback under a real transformers.Trainer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import PROMPT, ROWS, SITE, TOKENS, TRAIT, examples, make_plan, make_tracker, n_hooks, same_weights, strength_now
from families import FAMILIES
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from steer.callbacks import HFDriftCallback, HFSteeringCallback
from steer.drift import DriftRecord, DriftStore
from steer.errors import AttachError, ConfigError, DamagedFileError, HookDidNotRunError
from steer.intervene import Constant, Linear
from steer.model.watcher import watcher_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
NAME = f"add@{SITE}"
LOGGED = f"steer/add/{SITE}"  # prefix of its metrics
RESPONSE = ROWS * (TOKENS - PROMPT)  # response tokens of one epoch
STEP = 2 * (TOKENS - PROMPT)  # and of one micro-batch


def make_trainer(out: Path, model: nn.Module | None = None, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    callbacks = options.pop("callbacks", None)
    trainer = cls(
        model=FAMILIES["llama"]() if model is None else model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(4),  # type: ignore[arg-type]
        callbacks=callbacks,
    )
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def records(path: Path) -> list[DriftRecord]:
    with DriftStore(path) as store:
        return store.records()


class Spy(TrainerCallback):
    """The strength that was in force at each backward pass, and the global step it belonged to."""

    def __init__(self, steering: HFSteeringCallback) -> None:
        self.steering, self.seen = steering, []

    def note(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((state.global_step, strength_now(self.steering)))

    on_substep_end = on_pre_optimizer_step = note


# ---- steering


def test_strength_zero_trains_to_the_same_bits(tmp_path: Path) -> None:
    bare, steered, plan = make_trainer(tmp_path), make_trainer(tmp_path), make_plan(strength=0.0)
    bare.train()
    steering = HFSteeringCallback(plan).attach(steered)
    steered.train()
    assert losses(steered) == losses(bare) and same_weights(steered.model, bare.model)
    assert steering.attachment.fired() == {NAME: 0} and n_hooks(steered.model) == 0


def test_strength_follows_optimiser_steps_under_accumulation(tmp_path: Path) -> None:
    plan = make_plan(schedule=Constant(3.0))
    steering = HFSteeringCallback(plan, schedule=Linear(8))
    spy = Spy(steering)
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2, callbacks=[spy])
    steering.attach(trainer)
    trainer.train()
    assert spy.seen == [(step, step / 8) for step in range(8) for _ in range(2)]
    assert steering.attachment.fired() == {NAME: 2 * RESPONSE - 2 * STEP}  # step 0 has strength 0
    assert plan.interventions[0].schedule == Constant(3.0)  # the plan's own stays as it is
    assert steering.attachment[NAME].schedule == Linear(8) and float(steering.attachment[NAME].strength) == 1.0


def test_evaluation_inside_training_is_not_steered(tmp_path: Path) -> None:
    plan, trainer = make_plan(strength=50.0), make_trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    steering = HFSteeringCallback(plan).attach(trainer)
    trainer.train()
    inside = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert inside == trainer.evaluate()["eval_loss"]
    assert steering.attachment.fired() == {NAME: STEP}


def test_evaluation_is_steered_when_asked_for(tmp_path: Path) -> None:
    plan, trainer = make_plan(strength=5.0), make_trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    steering = HFSteeringCallback(plan, phases=("train", "validate")).attach(trainer)
    trainer.train()
    inside = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert inside != trainer.evaluate()["eval_loss"]
    assert steering.attachment.fired() == {NAME: STEP + RESPONSE // 4}


def test_response_scope_when_the_trainer_computes_its_own_loss(tmp_path: Path) -> None:
    class OwnLoss(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            logits = model(input_ids=inputs["input_ids"]).logits
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())

    plan, trainer = make_plan(), make_trainer(tmp_path, cls=OwnLoss)
    steering = HFSteeringCallback(plan).attach(trainer)
    trainer.train()
    assert steering.attachment.fired() == {NAME: RESPONSE}


def test_label_smoothing_takes_the_labels_away_from_the_model(tmp_path: Path) -> None:
    plan, trainer = make_plan(), make_trainer(tmp_path, label_smoothing_factor=0.1, max_steps=2)
    steering = HFSteeringCallback(plan).attach(trainer)
    trainer.train()
    assert steering.attachment.fired() == {NAME: 2 * STEP}


def test_the_trainer_gets_its_methods_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    HFSteeringCallback(make_plan()).attach(trainer)
    trainer.train()
    assert "compute_loss" not in vars(trainer) and n_hooks(trainer.model) == 0 and watcher_of(trainer.model) is None


def test_training_twice_is_steered_twice(tmp_path: Path) -> None:
    plan, trainer = make_plan(), make_trainer(tmp_path, max_steps=2)
    steering = HFSteeringCallback(plan).attach(trainer)
    for _ in range(2):
        trainer.train()
        assert steering.attachment.fired() == {NAME: 2 * STEP}


@pytest.mark.parametrize("where", ["training_step", "prediction_step"])
def test_an_exception_takes_the_hooks_off(tmp_path: Path, where: str) -> None:
    plan, trainer = make_plan(), make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("stop")

    setattr(trainer, where, fail)
    steering = HFSteeringCallback(plan).attach(trainer)
    with pytest.raises(ValueError, match="stop"):
        trainer.train()
    assert n_hooks(trainer.model) == 0 and not steering.attachment.is_attached and "compute_loss" not in vars(trainer)


def test_a_model_that_never_runs_is_noticed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    copied = copy.deepcopy(trainer.model)
    trainer.compute_loss = lambda model, inputs, **_: copied(**inputs).loss
    HFSteeringCallback(make_plan()).attach(trainer)
    with pytest.raises(HookDidNotRunError, match="first training batch"):
        trainer.train()
    assert n_hooks(trainer.model) == 0


def test_a_callback_that_does_not_know_its_trainer_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[HFSteeringCallback(make_plan())])
    with pytest.raises(AttachError, match="does not know its trainer"):
        trainer.train()


def test_a_trainer_that_is_not_of_transformers() -> None:
    for callback, twin in ((HFSteeringCallback(make_plan()), "SteeringCallback"), (HFDriftCallback(make_tracker()), "DriftCallback")):
        with pytest.raises(ConfigError, match=r"wrong type[\s\S]*Trainer[\s\S]*NoneType"):
            callback.attach(None)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"give Lightning's Trainer a {twin}"):
            pl.Trainer(callbacks=[callback], logger=False)  # type: ignore[list-item]


def test_attach_accepts_a_callback_that_is_in_the_list_already(tmp_path: Path) -> None:
    plan, callback = make_plan(), None
    callback = HFSteeringCallback(plan)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[callback])
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert callback.attachment.fired() == {NAME: STEP}
    with pytest.raises(AttachError, match="already"):
        callback.attach(make_trainer(tmp_path))


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    callback = HFSteeringCallback(make_plan()).attach(trainer)
    callback._in_train = True  # as within trainer.train
    with pytest.raises(ConfigError, match="DataParallel"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), trainer.state, trainer.control, model=trainer.model)


def test_two_plans(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    first, second = (HFSteeringCallback(plan).attach(trainer) for plan in (make_plan(), make_plan("layers.0.output", scope="all")))
    trainer.train()
    assert first.attachment.fired() == {NAME: 2 * STEP} and second.attachment.fired() == {"add@layers.0.output": 2 * 2 * TOKENS}
    assert n_hooks(trainer.model) == 0 and "compute_loss" not in vars(trainer)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        plan, trainer = make_plan(), make_trainer(tmp_path, gradient_checkpointing=on, max_steps=4)
        steering = HFSteeringCallback(plan).attach(trainer)
        trainer.train()
        assert steering.attachment.fired() == {NAME: 4 * STEP}
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_metrics_join_the_trainers_own_entries(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    heard: list[dict[str, float]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(dict(logs))

    trainer.add_callback(Logger())
    HFSteeringCallback(make_plan(), schedule=Linear(8), every_n_steps=2).attach(trainer)
    trainer.train()
    entries = {entry["step"]: entry for entry in trainer.state.log_history if f"{LOGGED}/strength" in entry}
    assert {step: (entry[f"{LOGGED}/strength"], entry[f"{LOGGED}/tokens"]) for step, entry in entries.items()} == {
        2: (1 / 8, STEP),
        4: (3 / 8, 3 * STEP),
    }
    assert all("loss" in entry for entry in entries.values())
    assert sum(f"{LOGGED}/strength" in logs for logs in heard) == 2


# ---- drift


def test_drift_is_measured_every_n_steps_and_logged_when_it_is(tmp_path: Path) -> None:
    trainer, tracker = make_trainer(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2, logging_steps=500), make_tracker()
    tracker.store = tmp_path / "d.sqlite"
    HFDriftCallback(tracker, every_n_steps=3).attach(trainer)
    trainer.train()
    stored = records(tmp_path / "d.sqlite")
    assert sorted({record.step for record in stored if record.mode == "probe"}) == [0, 3, 6, 8]
    assert {record.step: record.n for record in stored if record.mode == "stream"} == {3: 6 * STEP, 6: 6 * STEP, 8: 4 * STEP}
    logged = {entry["step"]: entry[f"{TRAIT}/effect_sd"] for entry in trainer.state.log_history if f"{TRAIT}/effect_sd" in entry}
    assert logged == {
        record.step: record.effect_sd for record in stored if record.kind == "named" and record.mode == "probe" and record.step
    }
    assert n_hooks(trainer.model) == 0


def test_drift_leaves_training_as_it_is(tmp_path: Path) -> None:
    bare, tracked = make_trainer(tmp_path), make_trainer(tmp_path)
    bare.train()
    HFDriftCallback(make_tracker(), every_n_steps=2).attach(tracked)
    tracked.train()
    assert losses(tracked) == losses(bare) and same_weights(tracked.model, bare.model)


def test_the_best_model_and_early_stopping_by_drift(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"{TRAIT}/effect_sd",
        greater_is_better=False,
        num_train_epochs=3,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)],
    )
    tracker = make_tracker(tmp_path / "d.sqlite")
    HFDriftCallback(tracker, every_n_steps=2).attach(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a monitor takes the old value")
        trainer.train()
    evaluated = {
        entry["step"]: entry[f"eval_{TRAIT}/effect_sd"] for entry in trainer.state.log_history if f"eval_{TRAIT}/effect_sd" in entry
    }
    effects = {
        record.step: record.effect_sd
        for record in records(tmp_path / "d.sqlite")
        if record.kind == "named" and record.mode == "probe" and record.step
    }
    assert evaluated == effects
    assert trainer.state.best_metric == min(effects.values())
    assert trainer.state.global_step == 4 and max(effects) == 4  # patience ran out at the second evaluation, and nothing came after


def test_an_evaluation_after_a_resume_and_before_the_next_measurement(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    options |= {"metric_for_best_model": f"{TRAIT}/effect_sd", "greater_is_better": False}
    first = make_trainer(tmp_path, max_steps=2, **options)
    HFDriftCallback(make_tracker(), every_n_steps=2).attach(first)
    first.train()
    second = make_trainer(tmp_path, max_steps=4, **options)
    HFDriftCallback(make_tracker(), every_n_steps=2).attach(second)
    with pytest.warns(UserWarning, match="read after step 3, and was measured after step 2"):
        second.train(resume_from_checkpoint=True)
    drifts = {entry["step"]: entry[f"eval_{TRAIT}/effect_sd"] for entry in second.state.log_history if "eval_loss" in entry}
    assert drifts[3] == drifts[2] != drifts[4]


def test_last_measurement_is_of_the_last_weights_not_of_the_best(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": f"{TRAIT}/effect_sd", "greater_is_better": False}
    runs = []
    for extra in ({}, best):
        trainer, tracker = make_trainer(tmp_path / str(len(extra)), **options, **extra), make_tracker()
        HFDriftCallback(tracker, every_n_steps=2).attach(trainer)
        trainer.train()
        runs.append([astuple(record) for record in tracker.latest])
    assert runs[0] == runs[1] and runs[0][0][0] == 3


def test_after_a_steering_callback_the_stream_is_read_as_steered(tmp_path: Path) -> None:
    means = {}
    for strength in (0.0, 2.0):
        trainer, tracker = make_trainer(tmp_path, max_steps=1), make_tracker()
        HFSteeringCallback(make_plan(strength=strength)).attach(trainer)
        HFDriftCallback(tracker).attach(trainer)
        trainer.train()
        means[strength] = {record.mode: record.mean for record in tracker.latest if record.kind == "named"}
    assert means[2.0]["stream"] != pytest.approx(means[0.0]["stream"], abs=0.05)


# ---- kill and resume


class Dies(Trainer):
    at = 6

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.at:
            raise MemoryError("killed")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, by_name: bool) -> None:
    def run(name: str, cls: type[Trainer] = Trainer, resume: str | bool | None = None) -> tuple[Trainer, Spy, Any]:
        steering = HFSteeringCallback(make_plan(), schedule=Linear(8))
        spy, tracker = Spy(steering), make_tracker(tmp_path / f"{name}.sqlite")
        options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path / name, cls=cls, callbacks=[spy], **options)
        steering.attach(trainer)
        HFDriftCallback(tracker, every_n_steps=3).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, spy, steering

    with pytest.raises(MemoryError):
        run("killed", Dies)
    folder = tmp_path / "killed" / "checkpoint-4"
    for later in (tmp_path / "killed").glob("checkpoint-6"):  # the kill came before this one was whole
        later.rename(tmp_path / "lost")
    resumed, tail, again = run("killed", resume=str(folder) if by_name else True)
    uninterrupted, spy, steering = run("whole")

    assert tail.seen == [entry for entry in spy.seen if entry[0] >= 4]
    assert same_weights(resumed.model, uninterrupted.model)
    for ours, theirs in zip(resumed.optimizer.state.values(), uninterrupted.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = again.state_dict(), steering.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [astuple(record) for record in records(tmp_path / "killed.sqlite")] == [
        astuple(record) for record in records(tmp_path / "whole.sqlite")
    ]


def test_a_damaged_state_is_not_trained_on(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path, **options)
    HFSteeringCallback(make_plan()).attach(first)
    first.train()
    (file,) = (tmp_path / "checkpoint-2").glob("steer_steering_state.*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    second = make_trainer(tmp_path, **{**options, "max_steps": 4})
    HFSteeringCallback(make_plan()).attach(second)
    with pytest.raises(DamagedFileError):
        second.train(resume_from_checkpoint=True)
    assert n_hooks(second.model) == 0


def test_a_checkpoint_without_state(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **options).train()
    (tmp_path / "checkpoint-2").joinpath("note").touch()
    resumed = make_trainer(tmp_path, **{**options, "max_steps": 4})
    steering = HFSteeringCallback(make_plan(), schedule=Linear(8)).attach(resumed)
    with pytest.warns(UserWarning, match="no state of this plan"):
        resumed.train(resume_from_checkpoint=True)
    assert steering.attachment.current_step == 4

    tracked = make_trainer(tmp_path, **{**options, "max_steps": 4})
    tracker = make_tracker(tmp_path / "d.sqlite")
    (tmp_path / "d.sqlite").touch()
    HFDriftCallback(tracker).attach(tracked)
    with pytest.raises(ConfigError, match="holds no drift state"):
        tracked.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert n_hooks(tracked.model) == 0
