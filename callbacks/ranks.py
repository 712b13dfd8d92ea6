"""Sums over the ranks that hold different batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The data-parallel ranks of this run.

    Args:
        group: process group of the ranks that see different batches; None for all of them. Under tensor parallelism several ranks see the
            same batch, and a sum over all ranks would count it more than once.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def many(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    @property
    def first(self) -> bool:
        """This rank takes over what was summed over the group before it was saved; the others start from zero."""
        return not self.many or dist.get_rank(self.group) == 0

    @property
    def writes(self) -> bool:
        """This rank writes files."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, a new tensor where there is more than one rank. Every rank of the group must call it."""
        if not self.many:
            return tensor
        total = self._reachable(tensor)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the group, likewise."""
        return self.sum(tensor) / dist.get_world_size(self.group) if self.many else tensor

    def share(self, tensor: Tensor) -> None:
        """Gives every rank of the group the first one's values, in place. Every rank must call it."""
        if not self.many:
            return
        values = self._reachable(tensor)
        group: Any = self.group or dist.group.WORLD
        dist.broadcast(values, src=dist.get_global_rank(group, 0), group=self.group)
        tensor.copy_(values)

    def _reachable(self, tensor: Tensor) -> Tensor:
        """A copy where the backend can read it."""
        nccl = dist.get_backend(self.group) == "nccl"
        return tensor.detach().to(torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device, copy=True)
