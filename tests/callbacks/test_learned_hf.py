"""Plans that learn under a transformers.Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import SITE, examples, learner, make_plan, only, same_weights
from families import FAMILIES, WIDTH
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from steer.callbacks import HFSteeringCallback
from steer.errors import ConfigError
from steer.intervene import Intervention, Linear, LoReFT, Plan

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning", "ignore::UserWarning:torch", "ignore::DeprecationWarning"
)


def hf(
    out: Path, plan: Plan | None, rate: float | None = 0.2, cls: type[Trainer] = Trainer, frozen: bool = False, **options: Any
) -> Trainer:
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": None,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "weight_decay": 0.1,
    }
    optimizers = options.pop("optimizers", (None, None))
    callbacks = options.pop("callbacks", None)
    model = FAMILIES["llama"]().requires_grad_(not frozen)
    trainer = cls(
        model=model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(4),  # type: ignore[arg-type]
        optimizers=optimizers,
        callbacks=callbacks,
    )
    if plan is not None:
        HFSteeringCallback(plan, learning_rate=rate).attach(trainer)
    return trainer


def hf_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hf_frozen_model_and_a_plan_that_learns(tmp_path: Path) -> None:
    plan = learner()
    trainer = hf(tmp_path, plan, 0.05, frozen=True, num_train_epochs=2, optim="adamw_torch", warmup_steps=0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    losses = hf_losses(trainer)
    assert sum(losses[8:]) < sum(losses[:8]) - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert "training_step" not in vars(trainer) and "compute_loss" not in vars(trainer)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_hf_learns_as_a_second_optimiser_beside_the_trainers_own_would(tmp_path: Path, clip: float) -> None:
    plan, by_hand, batches = learner(), learner(), []

    class Noting(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append({key: inputs[key].clone() for key in ("input_ids", "labels")})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = hf(tmp_path, plan, cls=Noting, max_grad_norm=clip, weight_decay=0.0)
    trainer.train()
    model = FAMILIES["llama"]()
    groups = [torch.optim.SGD(model.parameters(), lr=0.05), torch.optim.SGD(by_hand.parameters(), lr=0.2)]
    with by_hand.attached(model):
        for step, batch in enumerate(batches):
            for optimizer, rate in zip(groups, (0.05, 0.2), strict=True):
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 4)
            model(**batch, use_cache=False).loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
            for optimizer in groups:
                optimizer.step()
    assert torch.allclose(only(plan), only(by_hand), atol=1e-6) and only(plan).norm() > 0.001
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True))


def test_hf_parameters_in_an_optimiser_that_the_trainer_was_given(tmp_path: Path) -> None:
    plan = learner()
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.2)
    trainer = hf(tmp_path, None, frozen=True, optimizers=(optimizer, None))
    HFSteeringCallback(plan).attach(trainer)
    trainer.train()
    beside_plan = learner()
    beside = hf(tmp_path, beside_plan, frozen=True)
    beside.train()
    assert torch.allclose(only(plan), only(beside_plan), atol=1e-7) and only(plan).norm() > 0.001


class Killed(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise MemoryError("killed")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("frozen", [False, True])
def test_hf_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, frozen: bool) -> None:
    def run(name: str, cls: type[Trainer] = Trainer, resume: bool = False) -> tuple[Plan, Trainer]:
        plan = learner(schedule=Linear(10))
        options = {
            "save_strategy": "steps",
            "save_steps": 4,
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "optim": "adamw_torch",
        }
        trainer = hf(tmp_path / name, plan, cls=cls, frozen=frozen, **options)
        trainer.train(resume_from_checkpoint=resume)
        return plan, trainer

    with pytest.raises(MemoryError):
        run("killed", Killed)
    resumed, second = run("killed", resume=True)
    uninterrupted, first = run("whole")
    assert torch.equal(only(resumed), only(uninterrupted)) and only(uninterrupted).norm() > 0.01
    assert same_weights(first.model, second.model)


def test_hf_resumes_with_a_plan_that_was_loaded(tmp_path: Path) -> None:
    uninterrupted = Plan(Intervention(LoReFT.initial(WIDTH, 2).train(), SITE, "response"))
    half, resumed = copy.deepcopy(uninterrupted), Plan.load(uninterrupted.save(tmp_path / "made"))
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    hf(tmp_path / "whole", uninterrupted, **options).train()
    with pytest.raises(MemoryError):
        hf(tmp_path / "killed", half, cls=Killed, **options).train()
    hf(tmp_path / "killed", resumed, **options).train(resume_from_checkpoint=True)
    ours, theirs = uninterrupted.interventions[0].parameters, resumed.interventions[0].parameters
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hf_ends_with_the_vector_of_the_best_model(tmp_path: Path) -> None:
    plan, seen = learner(), {}

    class Note(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = only(plan)

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = hf(tmp_path, plan, callbacks=[Note()], **options, **best)
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 8 and torch.equal(only(plan), seen[step]) and not torch.equal(seen[step], seen[8])


def test_nothing_is_left_untrained_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing would train"):
        hf(tmp_path, learner(), None).train()
    with pytest.raises(ConfigError, match="has nothing to train"):
        hf(tmp_path, make_plan(), 0.1).train()

    class Cut(Trainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, *args, **kwargs).detach() + sum(parameter.sum() for parameter in model.parameters())

    with pytest.raises(ConfigError, match="got no gradient"):
        hf(tmp_path, learner(), cls=Cut).train()
