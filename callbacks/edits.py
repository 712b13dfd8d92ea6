"""EditCallback: edits of facts that are applied, measured and kept while a LightningModule is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from steer.callbacks import lightning
from steer.callbacks.lightning import LightningRun
from steer.edits.edit import Edit
from steer.errors import ConfigError
from steer.training.edit_run import EditRun
from steer.training.metric_crossing import MetricCrossing
from steer.training.ranks import Ranks


class EditCallback(LightningRun):
    """Puts edits of facts into the model during `Trainer.fit`, measures how well they hold, and keeps them in it.

    Logged from their application on, every so many steps: `edit/<edit>/probability`, the mean probability of the facts' targets on their
    prompts, and `edit/<edit>/key_drift`, the mean of |k' - k| / |k| over the keys k at which the edit was written. An edit whose
    probability falls below `keep` of what it was at first has faded, which is said in a warning (`EditFadesWarning`), and then

    - `protect="alarm"`: nothing more;
    - `"resolve"`: all edits are solved again for the keys of now, with the values that they hold, and `edit/resolved` counts how often;
    - `"project"`: what a step of the optimiser, its decay included, does at the keys is taken back, so that W k stays as it is; LoRA
      adapters on an edited map stop seeing these keys. The keys themselves may move on;
    - `"freeze"`: the blocks up to the last edited one, and the embeddings (a tied head with them), learn nothing from the application on;
    - `"damp"`: they move by `damping` of each step.

    Edits stay in the model after training: with `EditedWeights.of(model)` they can be reverted from what was trained. The list of edits as
    they are now, keys, values and all, is part of the checkpoint, and a resumed run goes on to the same bit. Put this callback after a
    `SteeringCallback` when its readings shall be steered.

    Args:
        edits: one or several, solved for the weights that training begins with, or on the model already. What is compared, before the first
            step of a run that is not resumed, are the matrices that they touch.
        tokenizer: of the model.
        at_step: optimiser steps before they are applied; 0 for the start.
        on_metric: apply them when a logged metric crosses a value instead: `MetricCrossing("val_loss", below=2.0)`.
        every_n_steps: optimiser steps between two measurements, each a pass over the facts' prompts.
        protect: see above.
        into: `base`, the weights (under a LoRA layer those inside it), or `adapter`, a LoRA adapter of its own beside the one that
            learns, which is off in a reference pass, too.
        keep, damping: see above.
        submodule: dotted path of the model inside the LightningModule.

    Raises:
        ConfigError: a value out of its range; edits without keys where these are needed; a strategy that keeps copies of weights of its
            own. EditError, WrongModelError: in `setup`, for weights that cannot be edited, or another model. WrongModelError: when
            training begins, for edits that were solved for other weights, unless `protect="resolve"` solves them again for these.

    Example:
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[EditCallback(edit, tokenizer, at_step=1, protect="freeze")])
        >>> trainer.fit(module, batches)
    """

    _run: EditRun

    def __init__(
        self,
        edits: Edit | Sequence[Edit],
        tokenizer: Any,
        *,
        at_step: int = 0,
        on_metric: MetricCrossing | None = None,
        every_n_steps: int = 10,
        protect: str = "alarm",
        into: str = "base",
        keep: float = 0.8,
        damping: float = 0.1,
        submodule: str = "",
    ) -> None:
        run = EditRun(
            edits,
            tokenizer,
            at_step=at_step,
            on_metric=on_metric,
            every_n_steps=every_n_steps,
            protect=protect,
            into=into,
            keep=keep,
            damping=damping,
        )
        super().__init__(run, submodule)

    @property
    def edits(self) -> list[Edit]:
        """The edits as they are now."""
        return list(self._run.edits)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(edits=self._run.name)

    # ---- hooks on and off

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._run.is_attached:  # the parameters stay the same objects where Lightning moves them
            super()._attach(trainer, module)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.handles_gradient_accumulation:
            raise _copies_weights(type(trainer.strategy).__name__)
        metrics = self._run.start(trainer.global_step, trainer.optimizers, state_place=self.state_place(trainer))
        if metrics:
            lightning.log(trainer, pl_module, metrics, in_batch=False)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._run.before_step()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = self._run.advance(trainer.global_step, trainer.callback_metrics)
        if metrics:
            lightning.log(trainer, pl_module, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not lightning.is_fitting(trainer):
            return
        metrics = self._run.seen(trainer.callback_metrics)
        if metrics:
            lightning.log(trainer, pl_module, metrics, in_batch=False)


def _copies_weights(strategy: str) -> ConfigError:
    return ConfigError(
        f"{strategy} keeps copies of the weights of its own, which would overwrite edits",
        expected="a strategy whose optimisers step on the weights of the model",
        found=strategy,
        remedy="train with DDPStrategy, or on one device",
    )
