"""What the Hugging Face callbacks share: a trainer they know, response masks, metrics that arrive, a file in each checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from steer.checks import of_type
from steer.errors import AttachError, ConfigError
from steer.files import load_artifact, save_artifact
from steer.training.drift_run import DriftRun
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


class TrainerRun(TrainerCallback):
    """A run that follows the events of a Trainer.

    A `TrainerCallback` is not told its trainer, what happens around its events, nor that training failed. `attach` therefore puts it
    before the trainer's other callbacks and wraps `trainer.train`, and, while that runs, `trainer.compute_loss`.

    Its state is in a file of its own inside `checkpoint-<step>`, written when all ranks have added theirs: what transformers stores for a
    callback is JSON of rank 0, restored by default not at all, and otherwise into a new object.
    """

    kind: str  # of the state file

    def __init__(self, run: SteeringRun | DriftRun) -> None:
        self._run = run
        self._trainer: Any = None
        self._in_train = False  # `train` of its own trainer is running
        self._resumed_from: Path | None = None
        self._pending: dict[str, float] = {}  # metrics on their way into the next log entry

    def attach(self, trainer: Trainer) -> Self:
        """Joins a trainer, before `train` is called. `HFSteeringCallback(plan).attach(trainer)` is all it takes.

        Raises:
            AttachError: it belongs to a trainer already.
            ConfigError: the trainer is not a `transformers.Trainer`.
        """
        of_type(trainer, Trainer, "the trainer of a callback", "pass the Trainer itself: trainer = Trainer(...); callback.attach(trainer)")
        if self._trainer is not None:
            raise _has_a_trainer(self._trainer)
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        place = sum(isinstance(callback, TrainerRun) for callback in callbacks)
        callbacks.insert(place, self)  # before the loggers and EarlyStoppingCallback, which read what is added here
        trainer.train = self._wrap_train(trainer)
        return self

    def _wrap_train(self, trainer: Trainer) -> Callable[..., Any]:
        """`trainer.train` with the run's beginning and end around it."""
        train = trainer.train

        @wraps(train)
        def train_with_run(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            folder = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
            self._resumed_from = Path(folder) if folder else None
            self._pending = {}
            self._in_train = True
            try:
                with self.wrapped_methods(trainer):
                    return train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._in_train = False
                self._run.detach()

        return train_with_run

    @property
    def state_key(self) -> str:
        """Raises ConfigError: Lightning asks its callbacks for it, and transformers never does."""
        raise _follows_no_lightning(self)

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        """Wraps methods of a trainer while it trains."""
        with replaced(trainer, "compute_loss", self._wrap_compute_loss(trainer.compute_loss)):
            yield

    def _wrap_compute_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """No event tells of the batch that a loss is computed of."""

        @wraps(compute_loss)
        def compute_loss_of_batch(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._run.response_mask.read(inputs)
            try:
                return compute_loss(model, inputs, *args, **kwargs)
            finally:
                self._run.response_mask.clear()

        return compute_loss_of_batch

    # ---- what a subclass does

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        """Attaches the run to the model."""
        raise NotImplementedError

    def start(self, step: int) -> None:
        """Starts training after `step` optimiser steps; a saved state is loaded by then."""
        raise NotImplementedError

    # ---- events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._in_train:
            raise _no_trainer(self, is_attached=self._trainer is not None)
        if args.n_gpu > 1:
            raise _data_parallel(args.n_gpu)
        ranks = Ranks()
        self.begin(model, ranks)  # anew, when auto_find_batch_size begins again after running out of memory
        if self._resumed_from is not None and (saved := self.load(self._resumed_from)) is not None:
            self._run.load_state_dict(saved, is_first_rank=ranks.is_first)
        self.start(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = self.state_dict()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_artifact(self.file(folder), self.kind, tensors, {"step": state.global_step, "run": self._run.name})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or any(name.startswith("eval_") for name in logs):
            return
        logs.update(self._pending)
        state.log_history[-1].update(self._pending)  # a copy of `logs`, made just before this event
        self._pending = {}

    # ---- metrics and checkpoints

    def report(self, values: dict[str, float]) -> None:
        """Puts metrics into the next log entry."""
        self._pending |= values

    def state_dict(self) -> dict[str, Tensor]:
        """State of the run. All ranks call it together."""
        return self._run.state_dict()

    def load(self, folder: Path) -> dict[str, Tensor] | None:
        """State of the run in a checkpoint, None when it holds none."""
        file = self.file(folder)
        return load_artifact(file, self.kind)[1] if file.exists() else None

    def file(self, folder: Path) -> Path:
        """File of the state in a checkpoint; two callbacks of a kind have different names."""
        name = self._run.name
        short = re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:40]
        return folder / f"steer_{self.kind}.{short}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an object an attribute of its own for a while."""
    had_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ---- errors


def _has_a_trainer(trainer: Any) -> AttachError:
    return AttachError(
        "this callback is attached to a trainer already",
        expected="a callback that is new",
        found=f"one of a {type(trainer).__name__}",
        remedy="make a new one for each trainer",
    )


def _follows_no_lightning(callback: TrainerRun) -> ConfigError:
    name = type(callback).__name__
    return ConfigError(
        f"{name} follows a transformers.Trainer, not one of Lightning's",
        expected="a call of attach(trainer) with a transformers.Trainer",
        found="a Lightning Trainer",
        remedy=f"give Lightning's Trainer a {name.removeprefix('HF')}",
    )


def _no_trainer(callback: TrainerRun, *, is_attached: bool) -> AttachError:
    name = type(callback).__name__
    return AttachError(
        f"{name} does not know its trainer",
        expected="a call of attach(trainer) before trainer.train()",
        found="a training that its own trainer.train() did not start" if is_attached else "no attach so far",
        remedy=f"leave it out of callbacks=[...] and call {name}(...).attach(trainer)",
    )


def _data_parallel(n_devices: int) -> ConfigError:
    return ConfigError(
        "nn.DataParallel runs copies of the model, whose hooks would mix up each other's batches",
        expected="one process per device",
        found=f"{n_devices} devices in one process",
        remedy="start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one device",
    )
