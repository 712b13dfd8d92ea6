"""Training of one arm of an experiment under Lightning, and what the hooks cost a step of it."""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from peft import get_peft_model
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from steer.callbacks import DriftCallback, SteeringCallback
from steer.directions import Directions
from steer.experiment.arms import Arm
from steer.experiment.overhead import step_overhead
from steer.intervene import Plan
from steer.model.tokens import collate

if TYPE_CHECKING:
    from steer.commands.train import Run


def train_arm(run: Run, arm: Arm, plan: Plan | None, directions: Directions) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one arm from the base weights.

    Returns:
        The model with the adapters of the arm, and the record of the training for metrics.json.
    """
    pl.seed_everything(run.config.seed, verbose=False)
    adapted = get_peft_model(run.model, copy.deepcopy(run.lora))  # PEFT writes into the configuration
    batches = run.batches()
    module = run.module(adapted)
    tracker = run.tracker(directions, run.out / "drift" / f"{arm.name}.sqlite")
    callbacks: list[pl.Callback] = [DriftCallback(tracker, every_n_steps=run.experiment.drift.every_n_steps)]
    if plan is not None:
        callbacks.insert(0, SteeringCallback(plan, phases=("train",)))
    adapted.train()  # models are loaded in evaluation mode
    trainer = _trainer(run, arm, callbacks)
    started = time.perf_counter()
    _fit(trainer, module, batches)
    seconds = time.perf_counter() - started
    adapted.save_pretrained(run.out / "adapters" / arm.name, save_embedding_layers=False)  # or PEFT asks the hub about the base
    record = {
        "steps": trainer.global_step,
        "seconds": seconds,
        "probe_seconds": tracker.probe_seconds,
        "loss": [float(loss) for loss in module.losses],
        "callback_overhead": None,
        "callback_overhead_range": None,
    }
    return adapted, record if plan is None else record | _callback_overhead(run, adapted, plan, directions)


def _trainer(run: Run, arm: Arm, callbacks: list[pl.Callback]) -> pl.Trainer:
    # Lightning's own choice would be another kind of bar than that of all else here, and would print into a pipe
    shows_progress = run.config.trainer.progress and sys.stdout.isatty()
    return pl.Trainer(
        max_steps=run.experiment.train.steps,
        max_epochs=-1,
        accelerator=run.config.trainer.accelerator,
        devices=run.config.trainer.devices,
        precision=run.config.trainer.precision,
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        enable_checkpointing=False,
        gradient_clip_val=run.experiment.train.gradient_clip,
        logger=CSVLogger(run.out / "logs", name=arm.name, version=""),
        log_every_n_steps=1,
        callbacks=[*callbacks, TQDMProgressBar(leave=False)] if shows_progress else callbacks,
    )


def _fit(trainer: pl.Trainer, module: pl.LightningModule, batches: DataLoader[Any]) -> None:
    try:
        trainer.fit(module, batches)
    except SystemExit:  # so Lightning ends after Ctrl-C, and it goes on ignoring the key
        if trainer.interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise


def _callback_overhead(run: Run, adapted: nn.Module, plan: Plan, directions: Directions) -> dict[str, Any]:
    """What the hooks of the plan and of the tracker add to one training step, as a fraction of the bare step."""
    spec = run.experiment.train
    batch = collate(run.train_rows[: spec.batch_size], run.pad, max_length=spec.max_length)

    @contextmanager
    def attached() -> Iterator[None]:
        with plan.attached(adapted), run.tracker(directions, None).attached(adapted):
            yield

    cost = step_overhead(adapted, batch, attached)
    return {"callback_overhead": cost.median, "callback_overhead_range": [cost.low, cost.high]}
