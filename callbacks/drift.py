"""DriftCallback: a tracker that measures while a LightningModule is trained."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from steer.callbacks import lightning
from steer.callbacks.runs import DriftRun
from steer.drift.tracker import DriftTracker


class DriftCallback(pl.Callback):
    """Measures the drift of named directions during `Trainer.fit`: before the first step, every so many optimiser steps, and at the end.

    What `DriftTracker.log_values` gives goes to the loggers and into `trainer.callback_metrics`, so that
    `ModelCheckpoint(monitor="drift/<direction>@<site>/effect_sd")` and `EarlyStopping` work. Put this callback after a `SteeringCallback`
    when the training tokens shall be read as steered. The records go to the tracker's store, written by rank 0; the tracker's state,
    summed over ranks, is part of the checkpoint, and a resumed run gives the records that the uninterrupted one would have given.

    Args:
        tracker: not attached yet, one for each run.
        every_n_steps: optimiser steps between two measurements.
        submodule: dotted path of the tracked model inside the LightningModule, for one that holds several (a policy and its reference).

    Raises:
        ConfigError: when training starts and the tracker has measured another run, or there are records but no state that goes with them.
    """

    def __init__(self, tracker: DriftTracker, *, every_n_steps: int = 10, submodule: str = "") -> None:
        self.tracker, self.submodule = tracker, submodule
        self._run = DriftRun(tracker, every_n_steps)
        self._untold = False  # the values of the baseline, or of the checkpoint, are not with the monitors yet
        self._device: torch.device | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(tracker=self._run.name)

    # ---- hooks on and off

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and lightning.complete(pl_module):
            self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, pl_module)

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        device = lightning.device_of(module)
        if self._run.attached and device == self._device:
            return
        self._run.end()
        self._run.begin(lightning.target(module, self.submodule), lightning.ranks_of(trainer))
        self._device = device

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._run.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._run.end()

    # ---- between optimiser steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.start(trainer.global_step):
            lightning.log(trainer, pl_module, self._run.values, batch=False)
        self._untold = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._run.hint.show(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._run.hint.show(None)
        if self._run.due(trainer.global_step):  # false while gradients are being accumulated
            lightning.log(trainer, pl_module, self._run.measure(trainer.global_step))
        elif self._untold:  # a monitor may ask before the first regular measurement
            lightning.monitor(pl_module, self._run.values)
        self._untold = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.due(trainer.global_step, last=True):
            lightning.log(trainer, pl_module, self._run.measure(trainer.global_step), batch=False)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._run.load_state_dict(lightning.cpu(state_dict), first=self._run.ranks.first)
