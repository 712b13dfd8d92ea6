"""What the Hugging Face callbacks share: a trainer they know, response masks, metrics that arrive, a file in each checkpoint."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from steer.checks import of_type
from steer.drift.stream import under
from steer.errors import AttachError, ConfigError, DamagedFileError, SteerError
from steer.files import contents, load_artifact, save_artifact
from steer.model.restoring import replaced, restoring
from steer.reading import read_json
from steer.training.drift_run import DriftRun
from steer.training.edit_run import EditRun
from steer.training.loss_run import LossRun
from steer.training.mask_run import MaskRun
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun

PENDING = "pending/"  # prefix of metrics in a checkpoint that no log entry has had yet


class TrainerRun(TrainerCallback):
    """A run that follows the events of a Trainer.

    A `TrainerCallback` is not told its trainer, what happens around its events, nor that training failed. `attach` therefore puts it
    before the trainer's other callbacks and wraps `trainer.train`, and, while that runs, `trainer.compute_loss`.

    Its state is in a file of its own inside `checkpoint-<step>`: what transformers stores for a callback is JSON of rank 0, restored by
    default not at all, and otherwise into a new object. The file is written before those of the trainer, whose last one
    (`trainer_state.json`) makes the checkpoint whole: a checkpoint that has that file has this one, whenever the process is killed.
    """

    kind: str  # of the state file

    def __init__(self, run: SteeringRun | DriftRun | LossRun | MaskRun | EditRun) -> None:
        self._run = run
        self._trainer: Any = None
        self._in_train = False  # `train` of its own trainer is running
        self._resumed_from: Path | None = None
        self._pending: dict[str, float] = {}  # metrics on their way into the next log entry

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._run})"

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
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(Path(trainer.args.output_dir)) or True
            self._resumed_from = None if isinstance(resume_from_checkpoint, bool | None) else Path(resume_from_checkpoint)
            if self._resumed_from is not None and not is_whole(self._resumed_from):
                raise _not_whole(self._resumed_from)
            self._pending = {}

            def end() -> None:
                self._in_train = False
                self._run.detach()

            with restoring(end):
                self._in_train = True
                with self.wrapped_methods(trainer):
                    return train(resume_from_checkpoint, *args, **kwargs)

        return train_with_run

    @property
    def state_key(self) -> str:
        """Raises ConfigError: Lightning asks its callbacks for it, and transformers never does."""
        raise _follows_no_lightning(self)

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        """Wraps methods of a trainer while it trains."""
        with (
            replaced(trainer, "compute_loss", self._wrap_compute_loss(trainer.compute_loss)),
            replaced(trainer, "_save_checkpoint", self._wrap_save_checkpoint(trainer, trainer._save_checkpoint)),
        ):
            yield

    def _wrap_save_checkpoint(self, trainer: Trainer, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """The event of a save comes when the checkpoint is whole; a kill before it would leave one without this state."""

        @wraps(save_checkpoint)
        def save_state_first(model: nn.Module, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
            self.save(Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
            return save_checkpoint(model, trial, *args, **kwargs)

        return save_state_first

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
        self._run.renew()
        self.begin(model, ranks)  # anew, when auto_find_batch_size begins again after running out of memory
        if self._resumed_from is not None and (saved := self.load(self._resumed_from)) is not None:
            self._pending = {name: float(value) for name, value in under(PENDING, saved).items()}
            self._run.load_state_dict({name: saved[name] for name in saved if not name.startswith(PENDING)}, is_first_rank=ranks.is_first)
        self.start(state.global_step)

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
        """State of the run, and metrics that no log entry has had yet. All ranks call it together."""
        pending = {f"{PENDING}{name}": torch.tensor(value, dtype=torch.float64) for name, value in self._pending.items()}
        return self._run.state_dict() | pending

    def save(self, folder: Path) -> None:
        """Writes the state into the folder of a checkpoint, before the trainer writes its own. All ranks call it together."""
        tensors = self.state_dict()
        trainer = self._trainer
        if trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)  # from here on it is there, and not whole
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run: the folder is not whole while it is written over
            save_artifact(self.file(folder), self.kind, tensors, {"step": trainer.state.global_step, "run": self._run.name})

    def load(self, folder: Path) -> dict[str, Tensor] | None:
        """State of the run in a checkpoint, None when it holds none. Raises DamagedFileError for the state of another step."""
        file = self.file(folder)
        if not file.exists():
            return None
        manifest, tensors = load_artifact(file, self.kind)
        if manifest.get("step") != (step := step_of(folder)):
            raise _of_another_step(file, step, manifest.get("step"))
        return tensors

    def state_place(self) -> str:
        """Where the state is in the checkpoint that was resumed from, for messages."""
        return str(self.file(self._resumed_from or Path(f"{PREFIX_CHECKPOINT_DIR}-<step>")))

    def file(self, folder: Path) -> Path:
        """File of the state in a checkpoint; two callbacks of a kind have different names."""
        name = self._run.name
        short = re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:40]
        return folder / f"steer_{self.kind}.{short}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"


def is_whole(checkpoint: Path) -> bool:
    """True when a trainer has finished the checkpoint: its last file is there, and is not cut off."""
    return step_of(checkpoint) is not None


def step_of(checkpoint: Path) -> int | None:
    """How many optimiser steps a checkpoint comes after; None where the trainer's state is not there as a whole."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        step = read_json(file)["global_step"] if file.is_file() else None
    except (SteerError, TypeError, KeyError):
        return None
    return step if type(step) is int else None


def last_whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint of a run that was finished, with a warning about later ones that were not; None when there is no checkpoint."""
    steps = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]
    latest_first = sorted(steps, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    last = next(filter(is_whole, latest_first), None)
    if last is None:
        if latest_first:
            raise _not_whole(latest_first[0])
        return None
    if torn := latest_first[: latest_first.index(last)]:
        warnings.warn(f"resuming from {last}: {', '.join(path.name for path in torn)} was not finished", stacklevel=3)
    return str(last)


# ---- errors


def _has_a_trainer(trainer: Any) -> AttachError:
    return AttachError(
        "this callback is attached to a trainer already",
        expected="a callback that is new",
        found=f"one of a {type(trainer).__name__}",
        remedy="make a new one for each trainer",
    )


def _not_whole(checkpoint: Path) -> DamagedFileError:
    return DamagedFileError(
        f"the checkpoint {checkpoint} was not finished",
        expected=f"{checkpoint / TRAINER_STATE_NAME}, which a trainer writes last, as a whole",
        found=contents(checkpoint) if checkpoint.is_dir() else "no such folder",
        remedy="resume from an earlier checkpoint, or delete this one and begin again",
    )


def _of_another_step(file: Path, step: int | None, found: object) -> DamagedFileError:
    return DamagedFileError(
        f"{file} is not of this checkpoint",
        expected=f"the state after step {step}",
        found=f"that after step {found}",
        remedy="put back the file that was saved with the checkpoint, or resume from another one",
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
