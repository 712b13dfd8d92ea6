"""Ranks: sums and means over the processes that train on different batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The data-parallel ranks of a training run.

    Args:
        group: process group of the ranks that see different batches; None for all of them. Under tensor parallelism several ranks see the
            same batch, and a sum over all ranks would count it more than once.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def is_distributed(self) -> bool:
        """There is more than one rank."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    @property
    def is_first(self) -> bool:
        """This rank takes over what was summed over the group before it was saved; the others start from zero."""
        return not self.is_distributed or dist.get_rank(self.group) == 0

    @property
    def writes_files(self) -> bool:
        """This rank writes the files of the run."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, a new tensor where there is more than one. Every rank of the group must call it."""
        if not self.is_distributed:
            return tensor
        total = self._copy_for_backend(tensor)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, a new tensor where there is more than one. Every rank of the group must call it."""
        return self.sum(tensor) / dist.get_world_size(self.group) if self.is_distributed else tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Copies the values of the group's first rank into the tensor of every rank. Every rank of the group must call it."""
        if not self.is_distributed:
            return
        values = self._copy_for_backend(tensor)
        group: Any = self.group or dist.group.WORLD
        dist.broadcast(values, src=dist.get_global_rank(group, 0), group=self.group)
        tensor.copy_(values)

    def _copy_for_backend(self, tensor: Tensor) -> Tensor:
        """A copy on a device that the backend can read."""
        nccl = dist.get_backend(self.group) == "nccl"
        return tensor.detach().to(torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device, copy=True)
