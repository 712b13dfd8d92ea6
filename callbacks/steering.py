"""SteeringCallback: a plan of interventions that acts while a LightningModule is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from steer.callbacks import lightning
from steer.callbacks.runs import SteeringRun, every
from steer.errors import ConfigError
from steer.intervene import Plan


class SteeringCallback(pl.Callback):
    """Steers the model of a LightningModule during `Trainer.fit`.

    The hooks are installed in `setup`, or after `configure_model` where the model is made or sharded there, and taken off in `teardown`
    and on an exception. Strengths follow `trainer.global_step`: in the step with global_step = k they are schedule(k), on every
    micro-batch of it, and after a resume too. Logged are `steer/<intervention>/strength` and `/tokens` (steered so far, over all ranks).

    Scopes that tell prompt from response read the batch's `labels`, `completion_mask` or `assistant_masks`, so a `training_step` that
    computes its own loss needs nothing more; where its passes hold other rows than the batch, wrap them in `steer.response_tokens`.

    Args:
        plan: not attached yet. After `fit` its phases and schedules are as they were, its strengths those of the last step.
        schedule: takes the place of the plan's schedules.
        phases: where it acts, a subset of train, validate, generate. The reference pass of a PEFT model is no policy pass, so it is left
            alone in every phase.
        every_n_steps: optimiser steps between two log entries.
        submodule: dotted path of the steered model inside the LightningModule, for one that holds several (a policy and its reference).
        learning_rate: of what the plan learns (`operator.train()`). Its parameters get an optimiser of the module's class and settings,
            without weight decay (AdamW where the module has none), which steps when the module's does, at a rate that rises and falls with
            the module's. Gradients are averaged over the ranks and clipped by a norm of their own with the trainer's limit; the state is in
            the checkpoint. None when `configure_optimizers` puts `plan.parameters()` into an optimiser itself.

    Raises:
        ConfigError: a phase or schedule that does not exist; a plan that acts in none of the phases; when training starts, a plan with
            parameters and no learning rate, and after a step, parameters that no gradient reached.
        HookDidNotRunError: after the first training batch, when no pass of it went through the model.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        schedule: Any = None,
        phases: Sequence[str] = ("train",),
        every_n_steps: int = 10,
        submodule: str = "",
        learning_rate: float | None = None,
    ) -> None:
        self.plan, self.every_n_steps, self.submodule = plan, every(every_n_steps), submodule
        self._run = SteeringRun(plan, schedule, phases, learning_rate)
        self._step = 0
        self._device: torch.device | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(plan=self._run.name)

    # ---- hooks on and off

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if lightning.complete(pl_module):
            self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = on_fit_start  # the first of them, when there was no model at setup

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING and self._run.phases == ("train",):
            return
        device = lightning.device_of(module)
        if self._run.attached and device == self._device:
            return
        self._run.end()
        others = [one for one in trainer.callbacks if isinstance(one, SteeringCallback) and one is not self]  # type: ignore[attr-defined]
        model, stack = lightning.target(module, self.submodule), any(one._run.attached for one in others)
        self._run.begin(model, lightning.ranks_of(trainer), stack=stack)
        self._device = device

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._run.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._run.end()

    # ---- between optimiser steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if self.plan.parameters() and trainer.strategy.handles_gradient_accumulation:
            raise ConfigError(
                f"{type(trainer.strategy).__name__} steps by itself, so that a plan cannot learn beside it",
                expected="a strategy whose optimiser steps are Lightning's",
                found=type(trainer.strategy).__name__,
                remedy="train the plan with DDPStrategy or ModelParallelStrategy",
            )
        self._run.start(self._step, pl_module, trainer.optimizers)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._run.batch(batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.learning.average()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        learning = self._run.learning
        if pl_module.automatic_optimization:  # otherwise a loss may leave the steered model out
            learning.check_reached()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        learning.step(scaler=scaler, clip=trainer.gradient_clip_val or 0.0, by_value=trainer.gradient_clip_algorithm == "value")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._run.ran()
        before, step = self._step, trainer.global_step
        if step == before:  # gradients are being accumulated
            return
        if step // self.every_n_steps > before // self.every_n_steps:
            lightning.log(trainer, pl_module, self._run.metrics())
        self._step = step
        self.plan.step(step)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run.hint.show(batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run.hint.show(None)

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._run.load_state_dict(lightning.cpu(state_dict), first=self._run.ranks.first)
