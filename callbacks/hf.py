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

from steer.callbacks.ranks import Ranks
from steer.callbacks.runs import DriftRun, SteeringRun
from steer.checks import of_type
from steer.errors import AttachError, ConfigError
from steer.files import load_artifact, save_artifact


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
        self._inside = False
        self._resumed: Path | None = None
        self._pending: dict[str, float] = {}  # metrics on their way into the next log entry

    def attach(self, trainer: Trainer) -> Self:
        """Joins a trainer, before `train` is called. `HFSteeringCallback(plan).attach(trainer)` is all it takes.

        Raises:
            AttachError: it belongs to a trainer already.
            ConfigError: what it is to join is no `transformers.Trainer`.
        """
        of_type(trainer, Trainer, "the trainer of a callback", "pass the Trainer itself: trainer = Trainer(...); callback.attach(trainer)")
        if self._trainer is not None:
            raise AttachError(
                "this callback is attached to a trainer already",
                expected="a callback that is new",
                found=f"one of a {type(self._trainer).__name__}",
                remedy="make a new one for each trainer",
            )
        self._trainer, callbacks = trainer, trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        place = sum(isinstance(one, TrainerRun) for one in callbacks)
        callbacks.insert(place, self)  # before the loggers and EarlyStoppingCallback, which read what is added here
        train = trainer.train

        @wraps(train)
        def followed(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            found = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
            self._resumed = Path(found) if found else None
            self._pending, self._inside = {}, True
            try:
                with self.within(trainer):
                    return train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._inside = False
                self._run.end()

        trainer.train = followed
        return self

    @property
    def state_key(self) -> str:
        """Which Lightning asks of its callbacks, and transformers never does."""
        raise ConfigError(
            f"{type(self).__name__} follows a transformers.Trainer, not one of Lightning's",
            expected="a call of attach(trainer) with a transformers.Trainer",
            found="a Lightning Trainer",
            remedy=f"give Lightning's Trainer a {type(self).__name__.removeprefix('HF')}",
        )

    @contextmanager
    def within(self, trainer: Trainer) -> Iterator[None]:
        """What is replaced in a trainer while it trains."""
        with replaced(trainer, "compute_loss", self._told(trainer.compute_loss)):
            yield

    def _told(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(compute_loss)
        def told(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._run.hint.show(inputs)
            try:
                return compute_loss(model, inputs, *args, **kwargs)
            finally:
                self._run.hint.show(None)

        return told

    # ---- what a subclass does at which event

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        """Attaches to the model."""
        raise NotImplementedError

    def start(self, step: int) -> None:
        """Training starts after `step` optimiser steps; a saved state is loaded by then."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """All ranks call it together."""
        raise NotImplementedError

    # ---- events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._inside:
            raise AttachError(
                f"{type(self).__name__} does not know its trainer",
                expected="a call of attach(trainer) before trainer.train()",
                found="no attach so far" if self._trainer is None else "a training that its own trainer.train() did not start",
                remedy=f"leave it out of callbacks=[...] and call {type(self).__name__}(...).attach(trainer)",
            )
        if args.n_gpu > 1:
            raise ConfigError(
                "nn.DataParallel runs copies of the model, whose hooks would mix up each other's batches",
                expected="one process per device",
                found=f"{args.n_gpu} devices in one process",
                remedy="start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one device",
            )
        self._run.end()  # auto_find_batch_size begins again after running out of memory
        ranks = Ranks()
        self.begin(model, ranks)
        if self._resumed is not None and (saved := self.load(self._resumed)) is not None:
            self._run.load_state_dict(saved, first=ranks.first)
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

    def report(self, values: dict[str, float]) -> None:
        """Puts metrics into the next log entry."""
        self._pending |= values

    def load(self, folder: Path) -> dict[str, Tensor] | None:
        """This state in a checkpoint, None when it holds none."""
        file = self.file(folder)
        return load_artifact(file, self.kind)[1] if file.exists() else None

    def file(self, folder: Path) -> Path:
        """Where a checkpoint holds this state; two callbacks of a kind have different names."""
        name = self._run.name
        short = re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:40]
        return folder / f"steer_{self.kind}.{short}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives one object an attribute of its own for a while."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
