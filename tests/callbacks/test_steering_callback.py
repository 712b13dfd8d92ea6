"""SteeringCallback under a real pytorch_lightning Trainer."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
from collections.abc import Callable
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
    Module,
    OwnLoss,
    loader,
    make_plan,
    make_tracker,
    make_trainer,
    n_hooks,
    same_weights,
    strength_now,
    vector,
)
from families import FAMILIES
from torch import Tensor, nn

from steer.callbacks import DriftCallback, SteeringCallback
from steer.errors import AttachError, ConfigError, ContextError, HookDidNotRunError
from steer.intervene import Add, Constant, Intervention, Linear, Plan
from steer.model.annotations import response_tokens
from steer.model.watcher import watcher_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
RESPONSE = ROWS * (TOKENS - PROMPT)  # response tokens of one epoch
NAME = f"add@{SITE}"
LOGGED = f"steer/add/{SITE}"  # prefix of its metrics


class Spy(pl.Callback):
    """The strength that was in force in each training batch, and the global step it belonged to."""

    def __init__(self, steering: SteeringCallback) -> None:
        self.steering, self.seen = steering, []

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append((trainer.global_step, strength_now(self.steering)))


@pytest.fixture(scope="module")
def plain() -> Module:
    """One epoch without any callback."""
    module = Module()
    make_trainer().fit(module, loader())
    return module


# ---- what it does to training


def test_strength_zero_trains_to_the_same_bits(plain: Module) -> None:
    plan, module = make_plan(strength=0.0), Module()
    steering = SteeringCallback(plan)
    make_trainer(steering).fit(module, loader())
    assert module.losses == plain.losses
    assert same_weights(module, plain)
    assert steering.attachment.fired() == {NAME: 0}


def test_training_is_steered_on_the_response_tokens_only(plain: Module) -> None:
    plan, module = make_plan(), Module()
    steering = SteeringCallback(plan)
    make_trainer(steering).fit(module, loader())
    assert module.losses[0] != plain.losses[0]
    assert steering.attachment.fired() == {NAME: RESPONSE}
    # the first loss is that of the same pass under the plan attached by hand
    model, batch = FAMILIES["llama"](), next(iter(loader()))
    with make_plan().attached(model):
        assert model(**batch, use_cache=False).loss.item() == module.losses[0]


def test_hooks_are_there_from_setup_to_teardown_and_leave_nothing(plain: Module) -> None:
    counts: dict[str, int] = {}

    class Count(pl.Callback):
        def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
            counts["setup"] = n_hooks(module)

        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            counts["train_end"] = n_hooks(module)

    module, keys = Module(), list(plain.state_dict())
    make_trainer(SteeringCallback(make_plan()), Count()).fit(module, loader())
    assert counts["setup"] == counts["train_end"] > 0
    assert n_hooks(module) == 0 and watcher_of(module) is None
    assert list(module.state_dict()) == keys


# ---- strengths follow optimiser steps


def test_strength_in_step_k_is_schedule_of_k_on_every_micro_batch() -> None:
    plan, schedule = make_plan(), Linear(4)
    steering = SteeringCallback(plan, schedule=schedule)
    spy = Spy(steering)
    make_trainer(steering, spy, accumulate_grad_batches=2).fit(Module(), loader())
    assert [step for step, _ in spy.seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert spy.seen == [(step, schedule(step)) for step, _ in spy.seen]


def test_accumulation_that_ends_short_at_the_end_of_an_epoch() -> None:
    plan, schedule = make_plan(), Linear(10)
    steering = SteeringCallback(plan, schedule=schedule)
    spy = Spy(steering)
    make_trainer(steering, spy, accumulate_grad_batches=3, max_epochs=2).fit(Module(), loader(rows=8))
    assert [step for step, _ in spy.seen] == [0, 0, 0, 1, 2, 2, 2, 3]
    assert all(strength == pytest.approx(schedule(step)) for step, strength in spy.seen)


def test_manual_optimisation_with_two_steps_a_batch() -> None:
    class Manual(Module):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.strengths: list[float] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:
            for optimizer in self.optimizers():
                self.strengths.append(strength_now(steering))
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            return [torch.optim.SGD(parameters[:5], lr=0.01), torch.optim.SGD(parameters[5:], lr=0.01)]

    steering, module = SteeringCallback(make_plan(), schedule=Linear(16)), Manual()
    make_trainer(steering).fit(module, loader())
    assert module.strengths == [2 * (i // 2) / 16 for i in range(16)]  # constant within a batch


def test_a_schedule_and_phases_are_of_the_attachment_not_of_the_plan() -> None:
    plan = make_plan(schedule=Linear(100))
    before = plan.explain()
    steering = SteeringCallback(plan, schedule="constant")
    make_trainer(steering).fit(Module(), loader())
    intervention, attachment = plan.interventions[0], steering.attachment
    assert intervention.schedule == Linear(100) and intervention.phases == ("train", "validate", "generate")
    assert plan.step == 0 and plan.explain() == before
    assert attachment.current_step == 8 and attachment[NAME].phases == ("train",)
    assert float(attachment[NAME].strength) == 1.0 and float(intervention.strength_at(8)) == pytest.approx(0.08)


def test_the_plans_own_schedule_is_used_when_none_is_given() -> None:
    plan = make_plan(schedule=Linear(8))
    steering = SteeringCallback(plan)
    spy = Spy(steering)
    make_trainer(steering, spy).fit(Module(), loader())
    assert spy.seen == [(step, step / 8) for step in range(8)]


# ---- phases


def test_validation_inside_training_is_not_steered() -> None:
    plan, module = make_plan(strength=50.0), Module()
    steering = SteeringCallback(plan)
    make_trainer(steering, limit_train_batches=1).fit(module, loader(), loader())
    bare = Module(module.model)
    make_trainer().validate(bare, loader(), verbose=False)
    assert module.val_losses == bare.val_losses
    assert steering.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT)}


def test_validation_is_steered_when_asked_for() -> None:
    plan, module = make_plan(strength=5.0), Module()
    steering = SteeringCallback(plan, phases=("train", "validate"))
    make_trainer(steering, limit_train_batches=1).fit(module, loader(), loader())
    bare = Module(module.model)
    make_trainer().validate(bare, loader(), verbose=False)
    assert module.val_losses != bare.val_losses
    assert steering.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT) + RESPONSE}


def test_generation_inside_training_is_not_steered_and_not_confused_with_the_batch() -> None:
    texts = []

    class Generating(OwnLoss):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            with torch.no_grad():
                texts.append(self.model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0))
            return super().training_step(batch, index)

    plan, module = make_plan(strength=50.0), Generating()
    steering = SteeringCallback(plan)
    make_trainer(steering, max_steps=1).fit(module, loader())
    expected = FAMILIES["llama"]().generate(next(iter(loader()))["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(texts[0], expected)
    assert steering.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT)}


def test_the_sanity_check_is_ignored() -> None:
    plan, callback = make_plan(), None
    callback = SteeringCallback(plan, phases=("train", "validate"))
    trainer = make_trainer(callback, num_sanity_val_steps=2, limit_val_batches=0.5, val_check_interval=8)
    trainer.fit(Module(), loader(), loader())
    saved = callback.state_dict()
    assert int(saved[f"{NAME}/tokens"]) == RESPONSE + RESPONSE // 2  # 8 training and 4 validation batches, not the 2 of the sanity check


def test_validate_alone() -> None:
    module = Module()
    make_trainer().validate(module, loader(), verbose=False)
    plain_losses, module.val_losses = module.val_losses, []
    make_trainer(SteeringCallback(make_plan())).validate(module, loader(), verbose=False)
    assert module.val_losses == plain_losses  # phases=("train",)
    module.val_losses = []
    make_trainer(SteeringCallback(make_plan(), phases=("validate",))).validate(module, loader(), verbose=False)
    assert module.val_losses != plain_losses and n_hooks(module) == 0


def test_training_after_validation_in_inference_mode() -> None:
    plan, module, trainer = make_plan(), Module(), None
    steering = SteeringCallback(plan, phases=("train", "validate"), schedule=Linear(4))
    trainer = make_trainer(steering)
    trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader())
    assert steering.attachment.fired() == {NAME: RESPONSE - 2 * (TOKENS - PROMPT)}  # step 0 has strength 0


# ---- which tokens are the response


def test_response_scope_when_the_module_computes_its_own_loss() -> None:
    plan, module, with_labels = make_plan(), OwnLoss(), Module()
    steering = SteeringCallback(plan)
    make_trainer(steering).fit(module, loader())
    make_trainer(SteeringCallback(make_plan())).fit(with_labels, loader())
    assert steering.attachment.fired() == {NAME: RESPONSE}
    assert module.losses == pytest.approx(with_labels.losses, rel=1e-5)


@pytest.mark.parametrize("key", ["completion_mask", "assistant_masks"])
def test_response_scope_from_masks(key: str) -> None:
    class Masked(OwnLoss):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return super().loss({**batch, "labels": batch["input_ids"]})

    rows = [{"input_ids": row["input_ids"], key: (row["labels"] != -100).long()} for row in loader().dataset]
    plan = make_plan()
    steering = SteeringCallback(plan)
    make_trainer(steering).fit(Masked(), torch.utils.data.DataLoader(rows, batch_size=2))
    assert steering.attachment.fired() == {NAME: RESPONSE}


def test_rows_that_differ_from_the_batch_need_a_response_mask() -> None:
    class Halves(OwnLoss):
        with_mask = False

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            with response_tokens(self.model, batch["labels"][:1] if self.with_mask else None):
                return self.model(input_ids=batch["input_ids"][:1], use_cache=False).logits.mean()

    module = Halves()
    with pytest.raises(ContextError, match="cannot tell prompt from response"):
        make_trainer(SteeringCallback(make_plan())).fit(module, loader())
    assert n_hooks(module) == 0
    plan, module.with_mask = make_plan(), True
    steering = SteeringCallback(plan)
    make_trainer(steering).fit(module, loader())
    assert steering.attachment.fired() == {NAME: RESPONSE // 2}


# ---- two callbacks, several models, models made late


def test_two_callbacks_both_act_and_keep_their_states(tmp_path: Path) -> None:
    first, second, both = make_plan(), make_plan("layers.0.output", scope="all"), Module()
    trainer = make_trainer(SteeringCallback(first), SteeringCallback(second))
    trainer.fit(both, loader())
    together = Module()
    interventions = [Intervention(Add(vector()), SITE, scope="response"), Intervention(Add(vector()), "layers.0.output", scope="all")]
    make_trainer(SteeringCallback(Plan(interventions))).fit(together, loader())
    assert both.losses == together.losses
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    tokens = [int(state[key]) for state in saved.values() for key in state if key.endswith("/tokens")]
    assert tokens == [RESPONSE, ROWS * TOKENS]


def test_two_callbacks_with_interventions_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(SteeringCallback(make_plan()), SteeringCallback(make_plan()))


def test_a_plan_somebody_else_attached_is_not_stacked_on_silently() -> None:
    module = Module()
    mine = make_plan().attach(module)
    before = n_hooks(module)
    with pytest.raises(AttachError, match="a plan is attached"):
        make_trainer(SteeringCallback(make_plan())).fit(module, loader())
    assert n_hooks(module) == before and mine.is_attached


def test_a_policy_and_its_reference_in_one_module() -> None:
    class Pair(Module):
        def __init__(self) -> None:
            super().__init__()
            self.reference = FAMILIES["llama"]().requires_grad_(False)

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                self.seen = self.reference(**batch, use_cache=False).loss.item()
            return super().loss(batch)

    plan, module = make_plan(strength=20.0), Pair()
    make_trainer(SteeringCallback(plan, submodule="model"), max_steps=1).fit(module, loader())
    bare = Module()
    make_trainer(max_steps=1).fit(bare, loader())
    assert module.seen == bare.losses[0] and module.losses[0] != bare.losses[0]


@pytest.mark.parametrize(("submodule", "message"), [("modl", "did you mean 'model'"), ("model.x.y", "no submodule"), (3, "wrong type")])
def test_a_submodule_that_is_not_there(submodule: Any, message: str) -> None:
    module = Module()
    with pytest.raises(ConfigError, match=message):
        make_trainer(SteeringCallback(make_plan(), submodule=submodule)).fit(module, loader())
    assert n_hooks(module) == 0


def test_a_model_that_is_made_in_configure_model() -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__(nn.Linear(1, 1))
            self.model = None

        def configure_model(self) -> None:
            self.model = self.model or FAMILIES["llama"]()

    plan, module, early = make_plan(), Late(), Module()
    make_trainer(SteeringCallback(plan)).fit(module, loader())
    make_trainer(SteeringCallback(make_plan())).fit(early, loader())
    assert module.losses == early.losses and n_hooks(module) == 0


def test_a_model_that_lightning_moves_after_setup_is_attached_again_in_order() -> None:
    """There is no second device here, so the callbacks are made to believe that they saw the model on another one."""
    runs = []
    for moved in (False, True):
        steering, tracker = SteeringCallback(make_plan()), make_tracker()
        drift, hooks = DriftCallback(tracker), []

        class Move(pl.Callback):
            def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
                if moved:  # noqa: B023
                    steering._device = drift._device = torch.device("meta")  # noqa: B023

            def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                hooks.append(n_hooks(module))  # noqa: B023

        module = Module()
        make_trainer(steering, drift, Move()).fit(module, loader())
        assert n_hooks(module) == 0
        runs.append((module.losses, hooks, steering.attachment.fired(), [record.mean for record in tracker.latest]))
    assert runs[0] == runs[1]


def test_fit_twice_counts_anew() -> None:
    plan, module = make_plan(), Module()
    callback = SteeringCallback(plan)
    for _ in range(2):
        make_trainer(callback).fit(module, loader())
        assert int(callback.state_dict()[f"{NAME}/tokens"]) == RESPONSE


# ---- when things go wrong


@pytest.mark.parametrize(
    ("where", "error"), [("training_step", ValueError), ("validation_step", ValueError), ("training_step", KeyboardInterrupt)]
)
def test_an_exception_takes_the_hooks_off(where: str, error: type[BaseException]) -> None:
    module, plan = Module(), make_plan(schedule=Linear(3))

    def fail(*_: Any) -> None:
        raise error("stop")

    setattr(module, where, fail)
    steering = SteeringCallback(plan, schedule=Constant())
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        make_trainer(steering).fit(module, loader(), loader())
    assert n_hooks(module) == 0 and not steering.attachment.is_attached
    assert plan.interventions[0].schedule == Linear(3)


def test_a_model_that_never_runs_is_noticed() -> None:
    module = Module()
    object.__setattr__(module, "bypass", copy.deepcopy(module.model))
    module.loss = lambda batch: module.bypass(**batch, use_cache=False).loss  # type: ignore[method-assign]
    with pytest.raises(HookDidNotRunError, match="first training batch"):
        make_trainer(SteeringCallback(make_plan())).fit(module, loader())
    assert n_hooks(module) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: SteeringCallback(make_plan(), phases=("training",)),
        lambda: SteeringCallback(make_plan(), phases=()),
        lambda: SteeringCallback(make_plan(), schedule="quadratic"),
        lambda: SteeringCallback(make_plan(), every_n_steps=0),
    ],
)
def test_bad_arguments(make: Callable[[], SteeringCallback]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_plan_that_acts_in_none_of_the_phases() -> None:
    module, plan = Module(), make_plan(phases=("generate",))
    with pytest.raises(ConfigError, match="does nothing"):
        make_trainer(SteeringCallback(plan)).fit(module, loader())
    assert n_hooks(module) == 0 and plan.interventions[0].phases == ("generate",)


# ---- metrics and checkpoints


def test_metrics_reach_the_logger_and_the_monitors(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=f"{LOGGED}/strength", mode="max", every_n_train_steps=2, filename="{step}")
    callback = SteeringCallback(make_plan(), schedule=Linear(8), every_n_steps=2)
    trainer = make_trainer(callback, best, logger=logger, log_every_n_steps=50)
    trainer.fit(Module(), loader())
    per_step = 2 * (TOKENS - PROMPT)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(int(row["step"]), float(row[f"{LOGGED}/strength"])) for row in rows] == [(2, 1 / 8), (4, 3 / 8), (6, 5 / 8), (8, 7 / 8)]
    assert [float(row[f"{LOGGED}/tokens"]) for row in rows] == [per_step * n for n in (1, 3, 5, 7)]  # step 0 has strength 0
    assert best.best_model_path.endswith("step=8.ckpt")


class Dies(Module):
    """Ends by an exception at an optimiser step, as a killed run does."""

    at = 6

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if self.global_step == self.at:
            raise MemoryError("killed")
        return super().training_step(batch, index)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(module: Module, plan: Plan, **options: Any) -> tuple[SteeringCallback, Spy, pl.Trainer]:
        callback = SteeringCallback(plan, schedule=Linear(8))
        spy = Spy(callback)
        save = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer = make_trainer(callback, spy, save, max_epochs=2, accumulate_grad_batches=2)
        trainer.fit(module, loader(), **options)
        return callback, spy, trainer

    with pytest.raises(MemoryError):
        run(Dies(), make_plan())
    resumed, uninterrupted = Module(), Module()
    again, tail, second = run(resumed, make_plan(), ckpt_path=tmp_path / "last.ckpt")
    callback, spy, trainer = run(uninterrupted, make_plan())

    assert tail.seen == spy.seen[8:]
    assert same_weights(resumed, uninterrupted)
    for ours, theirs in zip(second.optimizers[0].state.values(), trainer.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = again.state_dict(), callback.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_strength_after_a_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    first = make_trainer(SteeringCallback(make_plan(), schedule=Linear(8)), max_steps=3, accumulate_grad_batches=2)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "x.ckpt")
    plan = make_plan()
    steering = SteeringCallback(plan, schedule=Linear(8))
    spy = Spy(steering)
    trainer = make_trainer(steering, spy, max_steps=5, accumulate_grad_batches=2)
    trainer.fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert {step for step, _ in spy.seen} == {3, 4}
    assert all(strength == step / 8 for step, strength in spy.seen)


def test_strengths_set_by_hand_and_switches_survive_a_resume(tmp_path: Path) -> None:
    class ByHand(Module):
        def on_train_start(self) -> None:
            steering.attachment.set_strength(0.25)
            steering.attachment.enable(False)

    steering = SteeringCallback(make_plan())
    trainer = make_trainer(steering, max_steps=2)
    trainer.fit(ByHand(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = SteeringCallback(make_plan())
    make_trainer(again, max_steps=4).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert again.attachment[NAME].base == (0.25,) and not again.attachment[NAME].enabled
    assert again.attachment.fired() == {NAME: 0}


def test_a_checkpoint_without_state_is_said_so(tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    steering = SteeringCallback(make_plan(), schedule=Linear(8))
    spy = Spy(steering)
    with pytest.warns(UserWarning, match="no state of this plan"):
        make_trainer(steering, spy, max_steps=4).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert spy.seen == [(2, 2 / 8), (3, 3 / 8)]


# ---- other ways to train


def test_gradient_checkpointing_changes_nothing() -> None:
    plain_run, module, plan = Module(), Module(), make_plan()
    make_trainer(SteeringCallback(make_plan(), schedule=Linear(4))).fit(plain_run, loader())
    module.model.train().activation_checkpointing_enable({"use_reentrant": False})
    steering = SteeringCallback(plan, schedule=Linear(4))
    make_trainer(steering).fit(module, loader())
    assert module.losses == pytest.approx(plain_run.losses, rel=1e-6)
    assert steering.attachment.fired() == {NAME: RESPONSE - 2 * (TOKENS - PROMPT)}


class Lean(Module):
    """A training step of nothing that breaks a graph."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.mark.parametrize("module_is_compiled", [True, False], ids=["lightning module", "model inside"])
def test_compiled_training_is_steered_and_compiles_once(module_is_compiled: bool) -> None:
    eager, losses, module, plan, graphs = Losses(), Losses(), Lean(), make_plan(), []
    make_trainer(SteeringCallback(make_plan(), schedule=Linear(8)), eager).fit(Lean(), loader())

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if not module_is_compiled:
        module.model.compile(backend=backend)
    compiled = torch.compile(module, backend=backend) if module_is_compiled else module
    steering = SteeringCallback(plan, schedule=Linear(8))
    make_trainer(steering, losses).fit(compiled, loader())
    torch._dynamo.reset()
    assert losses.seen == pytest.approx(eager.seen, rel=1e-5)
    assert steering.attachment.fired() == {NAME: RESPONSE - 2 * (TOKENS - PROMPT)}  # step 0 has strength 0
    assert len(graphs) == 1 and n_hooks(module) == 0


def test_bf16_autocast() -> None:
    module, plan = Module(), make_plan()
    steering = SteeringCallback(plan)
    make_trainer(steering, precision="bf16-mixed").fit(module, loader())
    assert steering.attachment.fired() == {NAME: RESPONSE} and all(torch.isfinite(torch.tensor(module.losses)))


# ---- what is imported


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("SteeringCallback, DriftCallback", ("trl", "steer.callbacks.hf")),
        ("HFSteeringCallback, HFDriftCallback", ("trl", "pytorch_lightning")),
    ],
)
def test_one_framework_does_not_import_the_other(name: str, foreign: tuple[str, ...]) -> None:
    code = f"import sys; from steer.callbacks import {name}; print([name for name in {foreign!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
