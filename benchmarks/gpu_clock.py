"""How gpu.py measures: sizes, time of a call on the device, bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What is measured on."""

    device: str
    shape: tuple[int, int, int]  # batch, tokens, width of the activation for kernels
    features: int  # of the dictionary
    seconds: float  # that a timing may take
    layers: int
    heads: int
    inner: int
    vocabulary: int
    prompt: tuple[int, int]
    batch: tuple[int, int]  # of a training step
    rows: int  # decoded together, each with its own vector
    rounds: int

    @classmethod
    def full(cls) -> Sizes:
        """An activation of 8,192 tokens, and Llama 3.1 8B."""
        return cls("cuda", (4, 2048, 4096), 65536, 0.15, 32, 32, 14336, 128256, (1, 4096), (2, 2048), 256, 3)

    @classmethod
    def dry(cls) -> Sizes:
        return cls("cpu", (2, 8, 64), 512, 0.0, 2, 4, 96, 128, (1, 8), (2, 6), 4, 1)

    @property
    def width(self) -> int:
        return self.shape[2]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def states(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
        """A random activation."""
        return self.random(*self.shape, seed=seed).to(dtype)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)


def milliseconds(run: Callable[[], Any], sizes: Sizes, warm: int = 3) -> float:
    """Median time of a call on the device, after it has run a few times."""
    for _ in range(warm):
        run()
    if not sizes.on_gpu:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(3, min(1000, int(sizes.seconds / max(time.perf_counter() - started, 1e-6))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


def graph_milliseconds(runs: list[Callable[[], Any]], sizes: Sizes) -> float:
    """Median time of one of some calls on the device, captured together in a CUDA graph, so that the host's time does not count."""
    if not sizes.on_gpu:
        return milliseconds(runs[0], sizes)
    for run in runs[:3]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return milliseconds(graph.replay, sizes) / len(runs)


def copy_bandwidth(sizes: Sizes) -> float:
    """TB/s, bytes read and written, of a copy between two places of 1 GB."""
    source = torch.empty((1 << 30) if sizes.on_gpu else (1 << 16), dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), sizes) / 1e9
