"""Cells on several processes: `torchrun --nproc-per-node 2 -m steer.cli ab ...`.

The first rank chooses the cells, holds their leases, measures and writes; every rank trains them, on its share of the rows of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from steer.experiment.cells import Cell


def world_size() -> int:
    """Number of processes that torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """This process chooses, measures and writes."""
    return world_size() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Connects the processes that torchrun started; nothing where there is one."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def announce(cell: Cell | None) -> None:
    """Tells the other ranks which cell is trained next; None that there is no more."""
    if world_size() > 1:
        dist.broadcast_object_list([None if cell is None else cell.key], src=0)


def follow(cells: Sequence[Cell], train: Callable[[Cell], Any]) -> None:
    """What the other ranks do: train the cells that the first one announces."""
    by_key = {cell.key: cell for cell in cells}
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        train(by_key[told[0]])


def trainer_options(accelerator: str) -> dict[str, Any]:
    """What Lightning has to be told about the processes."""
    if world_size() == 1:
        return {}
    from pytorch_lightning.strategies import DDPStrategy

    local = int(os.environ["LOCAL_WORLD_SIZE"])
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    strategy = DDPStrategy(process_group_backend="gloo" if on_cpu else "nccl")
    return {"devices": local, "num_nodes": world_size() // local, "strategy": strategy, "use_distributed_sampler": False}
