"""SteeringCallback: a plan of interventions that acts while a LightningModule is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from steer.callbacks import lightning
from steer.callbacks.lightning import LightningRun
from steer.errors import ConfigError
from steer.intervene import Attachment, Plan
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


class SteeringCallback(LightningRun):
    """Steers the model of a LightningModule during `Trainer.fit`.

    The hooks are installed in `setup`, or after `configure_model` where the model is made or sharded there, and taken off in `teardown`
    and on an exception. Strengths follow `trainer.global_step`: in the step with global_step = k they are schedule(k), on every
    micro-batch of it, and after a resume too. Logged are `steer/<intervention>/strength` and `/tokens` (steered so far, over all ranks),
    `@` in the name of an intervention being written as `/`.

    Scopes that tell prompt from response read the batch's `labels`, `completion_mask` or `assistant_masks`, so a `training_step` that
    computes its own loss needs nothing more; where its passes hold other rows than the batch, wrap them in `steer.response_tokens`.

    Args:
        plan: what acts. Nothing of it changes but what it learns; strengths of the last step are those of `attachment` after `fit`. Every
            `fit` that begins at step 0 starts from the plan as it was given, not from what an earlier one has learned.
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

    Example:
        >>> steering = SteeringCallback(plan, schedule=steer.Linear(100))
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[steering])
        >>> trainer.fit(module, batches)
        >>> steering.attachment.fired()  # tokens that were steered, by intervention
    """

    _run: SteeringRun

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
        run = SteeringRun(plan, schedule=schedule, phases=phases, every_n_steps=every_n_steps, learning_rate=learning_rate)
        super().__init__(run, submodule)
        self.plan = plan

    @property
    def attachment(self) -> Attachment | None:
        """The plan on the model: `attachment.fired()` tells what it steered, during training and after. None before the first attach."""
        return self._run.attachment

    @property
    def state_key(self) -> str:
        return self._generate_state_key(plan=self._run.name)

    # ---- hooks on

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        steering = [callback for callback in callbacks if isinstance(callback, SteeringCallback) and callback is not self]
        stack = any(callback._run.is_attached for callback in steering)
        self._run.attach(model, ranks, stack=stack)

    def is_wanted(self, trainer: pl.Trainer) -> bool:
        return lightning.is_fitting(trainer) or self._run.phases != ("train",)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plan.parameters() and trainer.strategy.handles_gradient_accumulation:
            raise _steps_by_itself(type(trainer.strategy).__name__)
        self._run.start(trainer.global_step, pl_module, trainer.optimizers, state_place=self.state_place(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._run.batch_start(batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.learning.average_gradients()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        learning = self._run.learning
        if pl_module.automatic_optimization:  # otherwise a loss may leave the steered model out
            learning.check_gradients()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        learning.step(scaler=scaler, clip=trainer.gradient_clip_val or 0.0, by_value=trainer.gradient_clip_algorithm == "value")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._run.batch_end()
        metrics = self._run.advance(trainer.global_step)
        if metrics is not None:
            lightning.log(trainer, pl_module, metrics)

    # ---- validation and test

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run.response_mask.read(batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run.response_mask.clear()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end


def _steps_by_itself(strategy: str) -> ConfigError:
    return ConfigError(
        f"{strategy} steps by itself, so that a plan cannot learn beside it",
        expected="a strategy whose optimiser steps are Lightning's",
        found=strategy,
        remedy="train the plan with DDPStrategy or ModelParallelStrategy",
    )
