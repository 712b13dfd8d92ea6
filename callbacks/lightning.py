"""What the Lightning callbacks share: when hooks go on and off, which ranks hold different batches, and where metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError, did_you_mean
from steer.training.drift_run import DriftRun
from steer.training.edit_run import EditRun
from steer.training.loss_run import LossRun
from steer.training.mask_run import MaskRun
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


def _callback_classes() -> tuple[type, ...]:
    """Lightning's class of callbacks, under each of its two names that is installed.

    `lightning.pytorch` and `pytorch_lightning` are copies that know nothing of each other: a Trainer and a LightningCLI take subclasses of
    their own Callback only.
    """
    try:
        from lightning.pytorch import Callback as SameCallback
    except ImportError:
        return (pl.Callback,)
    return pl.Callback, SameCallback


if TYPE_CHECKING:
    Callback = pl.Callback
else:
    Callback = type(
        "Callback", _callback_classes(), {"__doc__": "Callback of `pytorch_lightning`, and of `lightning` where it is installed."}
    )


class LightningRun(Callback):
    """A run that follows the events of a Lightning Trainer, of the package `pytorch_lightning` or `lightning`.

    It is attached in `setup`, or after `configure_model` where the model is made or sharded there, and detached in `teardown` and on an
    exception. Its state is part of the checkpoint.

    Args:
        submodule: dotted path of the model inside the LightningModule.
    """

    def __init__(self, run: SteeringRun | DriftRun | LossRun | MaskRun | EditRun, submodule: str) -> None:
        self._run = run
        self.submodule = submodule
        self._device: torch.device | None = None  # where the model was at the attach

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._run})"

    # ---- what a subclass does

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        """Attaches the run to the model."""
        raise NotImplementedError

    def is_wanted(self, trainer: pl.Trainer) -> bool:
        """True when the run has something to do in fit, validate, test or predict, whichever the trainer does."""
        return is_fitting(trainer)

    # ---- hooks on and off

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if is_fitting(trainer) and trainer.global_step == 0:  # a checkpoint, if there is one, is loaded after this
            self._run.renew()
        if is_complete(pl_module):
            self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, pl_module)

    on_validation_start = on_fit_start  # the first of these four, when there was no model at setup
    on_test_start = on_fit_start
    on_predict_start = on_fit_start

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        device = device_of(module)
        if not self.is_wanted(trainer) or self._run.is_attached and device == self._device:
            return
        self.begin(trainer, find_submodule(module, self.submodule), ranks_of(trainer))
        self._device = device

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._run.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._run.detach()

    # ---- checkpoints

    def state_place(self, trainer: pl.Trainer) -> str:
        """Where the state is in a checkpoint, for messages."""
        return f"'{self.state_key}' under 'callbacks' in {getattr(trainer, 'ckpt_path', None) or 'the checkpoint'}"

    def state_dict(self) -> dict[str, Tensor]:
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        on_cpu = {name: tensor.cpu() for name, tensor in state_dict.items()}  # Lightning may have loaded it onto an accelerator
        self._run.load_state_dict(on_cpu, is_first_rank=self._run.ranks.is_first)


def is_fitting(trainer: pl.Trainer) -> bool:
    """True in `Trainer.fit`, its validation included."""
    return trainer.state.fn is not None and trainer.state.fn.value == TrainerFn.FITTING.value


def is_complete(module: pl.LightningModule) -> bool:
    """True when the model is there at `setup`. One that is built or sharded in `configure_model`, or still on the meta device, is not."""
    owner = next(cls for cls in type(module).__mro__ if "configure_model" in vars(cls))
    if owner.__module__.partition(".")[0] not in ("pytorch_lightning", "lightning"):  # a class of the user's makes the model there
        return False
    return not any(parameter.device.type == "meta" for parameter in module.parameters())


def find_submodule(module: pl.LightningModule, path: str) -> nn.Module:
    """The model to hook, at a dotted path inside a LightningModule. Raises ConfigError when there is none."""
    of_type(path, str, "the submodule of a callback", "pass its dotted path inside the LightningModule")
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise _no_such_submodule(module, path) from error


def device_of(module: pl.LightningModule) -> torch.device:
    """Where the model is. Lightning moves it after `setup`, so what was attached there is attached again, in the same order."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The data-parallel ranks; under a device mesh those of its dimension of that name."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return Ranks(None if mesh is None else mesh["data_parallel"].get_group())


def monitor(module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Hands metrics to `ModelCheckpoint(monitor=...)`, `EarlyStopping` and the progress of Lightning, at the end of a training batch."""
    module.log_dict(dict(values), on_step=True, on_epoch=False, logger=False, batch_size=1)


def log(trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, float], *, in_batch: bool = True) -> None:
    """Hands metrics to the monitors and to every logger.

    The loggers get them at the step they were measured, and not only where this step is a multiple of `log_every_n_steps`.

    Args:
        in_batch: at the end of a training batch, outside of which Lightning takes no step metrics.
    """
    if in_batch:
        monitor(module, values)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


def _no_such_submodule(module: pl.LightningModule, path: str) -> ConfigError:
    names = [name for name, _ in module.named_modules() if name]
    return ConfigError(
        f"no submodule of {type(module).__name__} is called '{path}'",
        expected=f"the dotted path of the model, such as {', '.join(names[:3])}" if names else "a LightningModule that holds a model",
        found=f"{len(names)} submodules, and not this one",
        remedy=did_you_mean(path, names) or "pass its path inside the LightningModule, or leave submodule out",
    )
