"""Several training runs with one callback: each starts from the plan and the tracker as they were given, unless it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import SITE, Module, examples, learner, loader, make_tracker, only, strength_now
from callback_helpers import make_trainer as make_lightning
from families import FAMILIES
from torch import Tensor
from transformers import Trainer, TrainingArguments

from steer.callbacks import DriftCallback, HFDriftCallback, HFSteeringCallback, SteeringCallback
from steer.drift import DriftStore
from steer.intervene import Linear

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")
NAME = f"add@{SITE}"


def model_init(trial: Any = None) -> Any:
    return FAMILIES["llama"]()


def make_hf(out: Path, **options: Any) -> Trainer:
    arguments = {"output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    return Trainer(
        model_init=model_init,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(4),  # type: ignore[arg-type]
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def hf_run(trainer: Trainer, **options: Any) -> tuple[list[float], Tensor]:
    trainer.train(**options)
    (callback,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, HFSteeringCallback))
    return losses(trainer), only(callback.plan)


def test_equal_trials_of_a_trainer_give_equal_results(tmp_path: Path) -> None:
    trainer = make_hf(tmp_path)
    steering = HFSteeringCallback(learner(), learning_rate=0.1, schedule=Linear(8)).attach(trainer)
    drift = HFDriftCallback(make_tracker(tmp_path / "d.sqlite"), every_n_steps=2).attach(trainer)
    first = hf_run(trainer)
    tokens, values = steering.attachment.fired(), dict(drift._run.values)
    second, third = hf_run(trainer), hf_run(trainer)
    assert first[0] == second[0] == third[0]
    assert torch.equal(first[1], second[1]) and torch.equal(first[1], third[1]) and float(first[1].norm()) > 0.1
    assert steering.attachment.fired() == tokens and int(steering.state_dict()[f"{NAME}/tokens"]) == tokens[NAME]
    assert drift._run.values == values
    stores = [tmp_path / name for name in ("d.sqlite", "d.2.sqlite", "d.3.sqlite")]
    recorded = []
    for store in stores:
        with DriftStore(store) as records:
            recorded.append(records.series("trait", SITE)["effect_sd"])
    assert len(recorded[0]) == 3 and recorded[0] == recorded[1] == recorded[2]


def test_strengths_set_in_one_run_do_not_reach_the_next(tmp_path: Path) -> None:
    trainer = make_hf(tmp_path)
    steering = HFSteeringCallback(learner(), learning_rate=0.1).attach(trainer)
    advance = steering._run.advance

    def advance_and_weaken(step: int) -> Any:
        steering.attachment.set_strength(0.25)
        return advance(step)

    steering._run.advance = advance_and_weaken  # type: ignore[method-assign]
    first = hf_run(trainer)
    assert strength_now(steering) == 0.25
    assert hf_run(trainer)[0] == first[0]


def test_what_is_put_into_the_plan_between_two_runs_counts_as_given(tmp_path: Path) -> None:
    trainer = make_hf(tmp_path)
    steering = HFSteeringCallback(learner(), learning_rate=0.1).attach(trainer)
    from_zero = hf_run(trainer)
    (parameter,) = steering.plan.parameters()
    with torch.no_grad():
        parameter.fill_(0.5)
    from_half = hf_run(trainer)
    assert from_half[0] != from_zero[0] and hf_run(trainer)[0] == from_half[0]


def test_a_resumed_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = make_hf(tmp_path / "whole", max_steps=4)
    HFSteeringCallback(learner(), learning_rate=0.1).attach(whole)
    uninterrupted = hf_run(whole)
    trainer = make_hf(tmp_path / "trials", max_steps=4, save_strategy="steps", save_steps=2)
    HFSteeringCallback(learner(), learning_rate=0.1).attach(trainer)
    hf_run(trainer)
    hf_run(trainer)
    resumed = hf_run(trainer, resume_from_checkpoint=str(tmp_path / "trials" / "checkpoint-2"))
    assert resumed[0] == uninterrupted[0] and torch.equal(resumed[1], uninterrupted[1])


def test_trials_of_a_search_save_their_state_in_their_own_folders(tmp_path: Path) -> None:
    class Search(Trainer):  # what a search backend does, without one
        number = 0

        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / f"run-{self.number}")

    best = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    trainer = make_hf(tmp_path, save_strategy="steps", save_steps=3, **best)
    trainer.__class__ = Search
    steering = HFSteeringCallback(learner(), learning_rate=0.1).attach(trainer)
    learned = []
    for number in range(2):
        trainer.number = number
        trainer.train()
        folder = tmp_path / f"run-{number}" / "checkpoint-3"
        state = steering.load(folder)
        assert state is not None and torch.equal(state[f"{NAME}/learned/vector"], only(steering.plan))
        learned.append(only(steering.plan))
    assert torch.equal(*learned) and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("validate", [False, True])
def test_several_fits_with_one_callback(tmp_path: Path, validate: bool) -> None:
    phases = ("train", "validate") if validate else ("train",)
    steering = SteeringCallback(learner(), learning_rate=0.1, schedule=Linear(8), phases=phases)
    drift = DriftCallback(make_tracker(tmp_path / "d.sqlite"), every_n_steps=2)
    runs = []
    for _ in range(3):
        module = Module()
        trainer = make_lightning(steering, drift, max_steps=4)
        trainer.fit(module, loader())
        runs.append((module.losses, only(steering.plan), drift._run.values, int(steering.state_dict()[f"{NAME}/tokens"])))
        if validate:  # with what was learned, and no reset
            trainer.validate(module, loader(4), verbose=False)
            assert torch.equal(only(steering.plan), runs[-1][1]) and module.val_losses
    for run in runs[1:]:
        assert run[0] == runs[0][0] and torch.equal(run[1], runs[0][1]) and run[2:] == runs[0][2:]
    assert (tmp_path / "d.3.sqlite").exists()


def test_a_fit_that_goes_on_with_its_own_trainer_keeps_what_was_learned(tmp_path: Path) -> None:
    steering, module = SteeringCallback(learner(), learning_rate=0.1), Module()
    trainer = make_lightning(steering, max_steps=3)
    trainer.fit(module, loader())
    before = only(steering.plan)
    trainer.fit_loop.epoch_loop.max_steps = 3  # nothing left to do
    trainer.fit(module, loader())
    assert torch.equal(only(steering.plan), before) and float(before.norm()) > 0
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, loader())
    assert len(module.losses) == 4 and 0 < float((only(steering.plan) - before).norm()) < float(before.norm())


def test_a_fit_that_resumes_after_another_one(tmp_path: Path) -> None:
    def trainer(*callbacks: Any, steps: int) -> pl.Trainer:
        return make_lightning(*callbacks, max_steps=steps)

    steering, tracker = SteeringCallback(learner(), learning_rate=0.1), DriftCallback(make_tracker(), every_n_steps=2)
    half = trainer(steering, tracker, steps=2)
    half.fit(Module(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(steering, tracker, steps=3).fit(Module(), loader())  # another one in between
    runs = []
    for pair in ((steering, tracker), (SteeringCallback(learner(), learning_rate=0.1), DriftCallback(make_tracker(), every_n_steps=2))):
        resumed = Module()
        trainer(*pair, steps=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
        runs.append((resumed.losses, only(pair[0].plan).tolist(), pair[1]._run.values))
    assert runs[0] == runs[1] and len(runs[0][0]) == 2
