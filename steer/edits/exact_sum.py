"""Sums of a weight and low-rank changes of it, the same to the bit on every device and with any number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer.edits.edit import WeightDelta
from steer.intervene.deploy.weight_edit import is_conv1d

_ROWS = 64  # of a weight that are added up at a time, so that they stay in the cache over all ranks


def exact_sum(start: Tensor, deltas: Sequence[WeightDelta], module: nn.Module, *, sign: int = 1) -> Tensor:
    """Start plus, or minus, the changes, one after the other, in fp64 and in the layout of the module.

    The product of two fp32 numbers is exact in fp64, so that it does not matter whether a device multiplies and adds in one step or in two.
    """
    device = torch.device("cpu") if start.device.type == "mps" else start.device  # has no fp64
    total = start.to(device, torch.float64, copy=True)
    by_rows = total.mT if is_conv1d(module) else total  # [d, f]
    factors = [(delta.u.to(device).double(), delta.v.mT.contiguous().to(device).double()) for delta in deltas]  # [d, rank], [rank, f]
    for first in range(0, len(by_rows), _ROWS):
        rows = slice(first, first + _ROWS)
        for u, v in factors:
            for column, row in zip(u[rows].unbind(1), v, strict=True):
                by_rows[rows].addcmul_(column[:, None], row, value=sign)
    return total


def relative_size(error: Tensor, change: Tensor) -> float:
    size = float(change.norm())
    return float(error.norm()) / size if size else 0.0
