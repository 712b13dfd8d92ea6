"""Memory and launches as tests in Triton's interpreter need them.

What the kernels allocate is poisoned and stands between two red zones: a place that nothing is written to, or a write beside it, shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.kernels import force
from steer.kernels.lazy_triton import LazyKernel

torch.set_num_threads(1)
ZONE = 64
OUT, SMALL = 5e-7, 2e-5  # activations and their gradients; gradients of few numbers, sums over tokens that may nearly cancel


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, float]]]:
    """Poisons what is allocated with torch.empty, and looks at the red zones afterwards."""
    zones: list[tuple[Tensor, float]] = []
    real = torch.empty

    def poisoned(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        value = 1e30 if dtype.is_floating_point else 77
        buffer = torch.full((size.numel() + 2 * ZONE,), torch.nan if dtype.is_floating_point else 0, dtype=dtype)
        buffer[:ZONE] = buffer[size.numel() + ZONE :] = value
        zones.append((buffer, value))
        return buffer[ZONE : size.numel() + ZONE].view(size)

    monkeypatch.setattr(torch, "empty", poisoned)
    with force("triton"):
        yield zones
    monkeypatch.setattr(torch, "empty", real)
    for buffer, value in zones:
        assert bool((buffer[:ZONE] == value).all() and (buffer[-ZONE:] == value).all()), "a write beside the memory that is meant"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    names: list[str] = []
    real = LazyKernel.launch

    def launch(self: LazyKernel, grid: tuple[int, ...], **arguments: Any) -> None:
        names.append(self.name)
        assert len(grid) <= 3 and torch.Size(grid).numel() <= 64, "slow in the interpreter"
        real(self, grid, **arguments)

    monkeypatch.setattr(LazyKernel, "launch", launch)
    return names


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
