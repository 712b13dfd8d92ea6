"""Patience and checkpoints that agree: a run that goes on from a checkpoint stops where it would have stopped without the interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint


class Patience(EarlyStopping):
    """Ends a run after so many measurements without a better held-out FVU. One that has ended trains no further when it is started again.

    Args:
        measurements: without a better one.
    """

    def __init__(self, measurements: int) -> None:
        super().__init__("val/fvu", patience=measurements, min_delta=1e-3, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # what a checkpoint holds is how long it has waited, not that the run was over
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class CheckpointBehindMeasurement(ModelCheckpoint):
    """The last checkpoint of a run. One of a step at which held-out text is measured is written behind the measurement, so that it holds
    what the measurement said: the measurement is not taken again by a run that goes on from there.

    Args:
        folder: gets `step=<n>.ckpt`.
        every: steps. measured_every: steps between two measurements.
    """

    def __init__(self, folder: Path, *, every: int, measured_every: int) -> None:
        super().__init__(
            folder, filename="step={step}", auto_insert_metric_name=False, every_n_train_steps=every,
            monitor="step", mode="max", save_top_k=1, save_on_train_epoch_end=False,
        )  # fmt: skip
        self.measured_every = measured_every

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step % self.measured_every:
            super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_batch_end(trainer, module, None, None, 0)  # at steps of its own, and in training alone
