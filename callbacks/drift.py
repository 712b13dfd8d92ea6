"""DriftCallback: a tracker that measures while a LightningModule is trained."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

from steer.callbacks import lightning
from steer.callbacks.lightning import LightningRun
from steer.drift.tracker import DriftTracker
from steer.training.drift_run import DriftRun
from steer.training.ranks import Ranks


class DriftCallback(LightningRun):
    """Measures the drift of named directions and features during `Trainer.fit`: before the first step, every so many steps, at the end.

    What `DriftTracker.log_values` gives goes to the loggers and into `trainer.callback_metrics`, so that
    `ModelCheckpoint(monitor="drift/<direction>/<site>/effect_sd")` and `EarlyStopping` work. Put this callback after a `SteeringCallback`
    when the training tokens shall be read as steered. The records go to the tracker's store, written by rank 0; the tracker's state,
    summed over ranks, is part of the checkpoint, and a resumed run gives the records that the uninterrupted one would have given.

    Args:
        tracker: not attached yet. Made new for every `fit` that begins at step 0, with a store of its own (`drift.2.sqlite`, ...).
        every_n_steps: optimiser steps between two measurements.
        submodule: dotted path of the tracked model inside the LightningModule, for one that holds several (a policy and its reference).

    Raises:
        ConfigError: when training starts and the tracker has measured another run, or there are records but no state that goes with them.

    Example:
        >>> tracker = steer.DriftTracker({"cheerful": directions}, probe=probe, store="drift.sqlite")
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[DriftCallback(tracker, every_n_steps=1)])
        >>> trainer.fit(module, batches)
        >>> trainer.callback_metrics["drift/cheerful/layers.12.output/effect_sd"]
    """

    _run: DriftRun

    def __init__(self, tracker: DriftTracker, *, every_n_steps: int = 10, submodule: str = "") -> None:
        super().__init__(DriftRun(tracker, every_n_steps), submodule)
        self.tracker = tracker
        self._monitors_wait = False  # for the values of the baseline, or of the checkpoint

    @property
    def state_key(self) -> str:
        return self._generate_state_key(tracker=self._run.name)

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.start(trainer.global_step, state_place=self.state_place(trainer)):
            lightning.log(trainer, pl_module, self._run.values, in_batch=False)
        self._monitors_wait = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._run.response_mask.read(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._run.response_mask.clear()
        if self._run.is_due(trainer.global_step):  # false while gradients are being accumulated
            lightning.log(trainer, pl_module, self._run.measure(trainer.global_step))
        elif self._monitors_wait:  # a monitor may ask before the first regular measurement
            lightning.monitor(pl_module, self._run.values)
        self._monitors_wait = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if lightning.is_fitting(trainer) and not trainer.sanity_checking:
            monitors = [*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks]
            self._run.warn_if_stale(trainer.global_step, [getattr(callback, "monitor", None) for callback in monitors])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:  # monitors look here instead
            self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.is_due(trainer.global_step, is_last=True):
            lightning.log(trainer, pl_module, self._run.measure(trainer.global_step), in_batch=False)
