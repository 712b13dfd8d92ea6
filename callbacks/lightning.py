"""What the Lightning callbacks share: when a model can be hooked, which ranks hold different batches, and where metrics go."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import nn

from steer.callbacks.ranks import Ranks
from steer.checks import of_type
from steer.errors import ConfigError, did_you_mean


def complete(module: pl.LightningModule) -> bool:
    """True when the model is there at `setup`. One that is built or sharded in `configure_model`, or still on the meta device, is not."""
    if type(module).configure_model is not pl.LightningModule.configure_model:
        return False
    return not any(parameter.device.type == "meta" for parameter in module.parameters())


def target(module: pl.LightningModule, submodule: str) -> nn.Module:
    """The model to hook. Raises ConfigError when there is no such submodule."""
    of_type(submodule, str, "the submodule of a callback", "pass its dotted path inside the LightningModule")
    try:
        return module.get_submodule(submodule)
    except AttributeError as error:
        names = [name for name, _ in module.named_modules() if name]
        raise ConfigError(
            f"no submodule of {type(module).__name__} is called '{submodule}'",
            expected=f"the dotted path of the model, such as {', '.join(names[:3])}" if names else "a LightningModule that holds a model",
            found=f"{len(names)} submodules, and not this one",
            remedy=did_you_mean(submodule, names) or "pass its path inside the LightningModule, or leave submodule out",
        ) from error


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


def log(trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, float], *, batch: bool = True) -> None:
    """Hands metrics to the monitors and to every logger.

    The loggers get them at the step they were measured, and not only where this step is a multiple of `log_every_n_steps`.

    Args:
        batch: at the end of a training batch, outside of which Lightning takes no step metrics.
    """
    if batch:
        monitor(module, values)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


def cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that Lightning may have loaded onto an accelerator."""
    return {name: tensor.cpu() for name, tensor in state.items()}
