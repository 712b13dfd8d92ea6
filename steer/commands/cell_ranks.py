"""Cells on several processes: `torchrun --nproc-per-node 2 -m steer.cli ab ...`, or `accelerate launch`, which starts them by torchrun.

The first rank chooses the cells, holds their leases, measures and writes; every rank trains them, on its share of the rows of each batch,
by `trainer.strategy`: how the ranks share the work changes no number beyond rounding, and makes no other cell.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from steer.errors import ConfigError, did_you_mean
from steer.experiment.cells import Cell

FSDP2 = "fsdp2"
_PATIENCE = timedelta(days=30)  # of the ranks that wait while the first one measures


def world_size() -> int:
    """Number of processes that torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """This process chooses, measures and writes."""
    return world_size() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def process_group(accelerator: str) -> Iterator[None]:
    """Connects the processes that torchrun started; nothing where there is one."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = _backend(accelerator)
    if backend == "nccl":  # which speaks from the current device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    try:
        yield
    finally:
        _announcements.cache_clear()
        dist.destroy_process_group()


def announce(cell: Cell | None) -> None:
    """Tells the other ranks which cell is trained next; None that there is no more."""
    if world_size() > 1:
        dist.broadcast_object_list([None if cell is None else cell.key], src=0, group=_announcements())


def follow(cells: Sequence[Cell], train: Callable[[Cell], Any]) -> None:
    """What the other ranks do: train the cells that the first one announces."""
    by_key = {cell.key: cell for cell in cells}
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=_announcements())
        if told[0] is None:
            return
        train(by_key[told[0]])


@cache
def _announcements() -> Any:
    """A group of its own: the one that trains gives up after minutes without a word."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _backend(accelerator: str) -> str:
    return "gloo" if accelerator == "cpu" or not torch.cuda.is_available() else "nccl"


# ---- what Lightning is told


def strategies() -> list[str]:
    """Values of `trainer.strategy`: DDP in the variants that leave the starting of processes to torchrun, and FSDP2."""
    kinds = {name: StrategyRegistry[name] for name in StrategyRegistry.available_strategies()}
    is_ddp = [name for name, kind in kinds.items() if kind["strategy"] is DDPStrategy and kind["init_params"]["start_method"] == "popen"]
    return [*is_ddp, FSDP2]


def is_sharded(trainer: DictConfig) -> bool:
    """The cells are trained on models that are sharded over the ranks."""
    return world_size() > 1 and trainer.strategy == FSDP2


def trainer_options(trainer: DictConfig) -> dict[str, Any]:
    """Device, precision, processes and strategy for `pl.Trainer`."""
    options = {"accelerator": trainer.accelerator, "precision": trainer.precision}
    if world_size() == 1:  # also in a job of SLURM, in which Lightning would look for a rank, and catch the signals of the launcher
        return options | {"devices": trainer.devices, "plugins": [LightningEnvironment()]}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = world_size() // local
    return options | {"devices": local, "num_nodes": nodes, "strategy": _strategy(trainer), "use_distributed_sampler": False}


def _strategy(trainer: DictConfig) -> DDPStrategy | ModelParallelStrategy:
    backend = _backend(trainer.accelerator)
    if trainer.strategy == FSDP2:
        return ModelParallelStrategy(
            data_parallel_size=world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=backend
        )
    return DDPStrategy(process_group_backend=backend, **StrategyRegistry[trainer.strategy]["init_params"])


def check_trainer(trainer: DictConfig) -> None:
    """Raises ConfigError for a device, precision or strategy with which no cell can be trained, before anything is loaded."""
    if trainer.strategy not in strategies():
        raise _unknown_strategy(trainer.strategy)
    try:
        trial = pl.Trainer(
            **trainer_options(trainer), logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
    except Exception as error:  # Lightning has types of its own, torch and the devices have others
        raise _impossible_trainer(trainer, error) from error
    if world_size() == 1 and trial.num_devices > 1:
        raise _starts_processes(trainer.devices, trial.num_devices)


# ---- errors


def _unknown_strategy(strategy: Any) -> ConfigError:
    known = strategies()
    near = did_you_mean(str(strategy), known)
    if str(strategy) in StrategyRegistry.available_strategies():
        near = f"set trainer.strategy={FSDP2 if 'fsdp' in str(strategy) or 'deepspeed' in str(strategy) else 'ddp'}, under torchrun"
    remedy = near or "set trainer.strategy=ddp"
    return ConfigError(f"cells cannot be trained by strategy '{strategy}'", expected=", ".join(known), found=strategy, remedy=remedy)


def _impossible_trainer(trainer: DictConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"no cell can be trained like this here: {error}",
        expected="an accelerator, devices and a precision that Lightning can use on this machine",
        found=f"accelerator={trainer.accelerator}, devices={trainer.devices}, precision={trainer.precision}",
        remedy="set these keys of trainer, for instance trainer.accelerator=auto trainer.devices=1 trainer.precision=32-true",
    )


def _starts_processes(devices: Any, found: int) -> ConfigError:
    return ConfigError(
        "a cell on several devices needs a process for each of them",
        expected="trainer.devices=1, or torchrun, which says how many there are",
        found=f"trainer.devices={devices}, which means {found} devices here",
        remedy=f"torchrun --nproc-per-node {found} -m steer.cli ab ..., with the same keys but this one",
    )
