"""LossCallback: losses of activations that are added to the training loss of a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from steer.callbacks import lightning
from steer.callbacks.lightning import LightningRun
from steer.errors import ConfigError
from steer.features.token_loss import TokenLoss
from steer.model.restoring import replaced
from steer.training.loss_run import LossRun
from steer.training.ranks import Ranks


class LossCallback(LightningRun):
    """Adds feature losses to the loss that `training_step` returns, or that it hands to `manual_backward`.

    They are added where Lightning starts the backward pass, so that they share its precision, its accumulation of gradients (the mean
    over the micro-batches) and its averaging over ranks, and `training_step` stays as it is: what it returns and logs is its own loss.
    Logged are `steer/<loss>/loss`, without the weight. Feature losses read the activation as the edits of a `SteeringCallback` leave it.

    Args:
        losses: `steer.FeatureLoss`, `steer.features.GainPenalty`.
        every_n_steps: optimiser steps between two log entries.
        submodule: dotted path of the model inside the LightningModule, for one that holds several (a policy and its reference).

    Raises:
        ConfigError: a strategy that accumulates gradients by itself; nothing that is trained has an influence on a loss; re-entrant
            gradient checkpointing; after a batch, a backward pass that Lightning did not start.
        HookDidNotRunError: after the first training batch, when no pass of it came to a site.

    Example:
        >>> loss = steer.FeatureLoss(dictionary, [3, 40], high=0.0, scope="response", weight=0.1)
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[LossCallback([loss])])
        >>> trainer.fit(module, batches)
    """

    _run: LossRun

    def __init__(self, losses: Sequence[TokenLoss], *, every_n_steps: int = 1, submodule: str = "") -> None:
        super().__init__(LossRun(losses, every_n_steps=every_n_steps), submodule)
        self._wrapped = ExitStack()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(losses=self._run.name)

    # ---- hooks on and off

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._wrapped.close()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._wrapped.close()
        super().on_exception(trainer, pl_module, exception)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if strategy.handles_gradient_accumulation:
            raise _accumulates_by_itself(type(strategy).__name__)
        backward = strategy.backward

        @wraps(backward)
        def backward_with_losses(closure_loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            # in manual optimisation the share of a backward pass is known to the module alone
            share = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
            return backward(self._run.added(closure_loss, share), *args, **kwargs)

        self._wrapped.close()
        self._wrapped.enter_context(replaced(strategy, "backward", backward_with_losses))
        self._run.start(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._run.batch_start(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._run.batch_end()
        metrics = self._run.advance(trainer.global_step)
        if metrics:
            lightning.log(trainer, pl_module, metrics)


def _accumulates_by_itself(strategy: str) -> ConfigError:
    return ConfigError(
        f"{strategy} accumulates gradients by itself, so that it is not known what share of a step a loss has",
        expected="a strategy whose gradient accumulation is Lightning's",
        found=strategy,
        remedy="train with DDPStrategy or ModelParallelStrategy",
    )
