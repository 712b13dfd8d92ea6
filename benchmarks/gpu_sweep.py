"""Launch parameters of the kernels, swept on the card: tile sizes, warps, and the order of the second sweep over a tile.

The defaults follow from reading and compiling (see `default_launch` in the files of the kernels); this table says where others are faster.
All kernels run without gradients: the backward kernels move the same bytes with the same parameters. There are at most 40 compilations, and
nothing is begun after BUDGET seconds, so that the whole should stay below four minutes. Scalar tiles of 4 tokens at width 8,192 are left
out: compiled for sm_90 they spill 960 bytes a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_clock import Sizes, graph_milliseconds
from torch import Tensor

from steer.kernels import edit_scalar, edit_tiles
from steer.kernels.drift_reference import drift_stats_reference
from steer.kernels.drift_stats import StatsLaunch
from steer.kernels.drift_stats import default_launch as default_stats_launch
from steer.kernels.drift_stats import launch as launch_stats
from steer.kernels.edit_reference import edit_reference
from steer.kernels.edit_scalar import ScalarLaunch, warps_for
from steer.kernels.edit_task import EditNumbers, EditOptions, EditTask
from steer.kernels.edit_tiles import TilesLaunch
from steer.kernels.lazy_triton import LazyKernel

BUDGET = 210.0  # seconds
WIDTHS = (4096, 8192)
TOKENS = (256, 2048, 8192, 32768)
DRY_WIDTHS, DRY_TOKENS = (64, 128), (8, 40)
TILES = tuple(TilesLaunch(tile, 64, reverse, warps, 3) for tile in (16, 32, 64) for warps in (4, 8) for reverse in (False, True))
SCALAR_TILES = {4096: (1, 2, 4), 8192: (1, 2)}  # tokens of a program
STATS = (StatsLaunch(16, 4, 3), StatsLaunch(64, 8, 3))
M_TILES, M_SCALAR = 16, 4  # directions
TOLERANCE = 4e-3  # relative: one rounding to bf16, 2^-9, and as much again where the reference is rounded to the other side


Results = tuple[Tensor, ...]


class Bank(NamedTuple):
    """Directions that the kernels of one width are given, and the lower bound of each projection.

    A clamp has no jump, so two roundings of a projection give nearly the same result.
    """

    read: Tensor  # [16, width]
    write: Tensor  # [16, width]
    low: Tensor  # [16]


@dataclass(frozen=True)
class Variant:
    """A kernel with one set of launch parameters.

    Attributes:
        run: of an activation [1, tokens, width] and memory of its shape for a result; returns what `reference` returns, maybe in bf16.
        passes: reads and writes of the activation that cannot be avoided.
    """

    kernel: str
    parameters: TilesLaunch | ScalarLaunch | StatsLaunch
    is_default: bool
    passes: int
    run: Callable[[Tensor, Tensor], Results]
    reference: Callable[[Tensor], Results]

    @property
    def label(self) -> str:
        """Parameters by name."""
        return ", ".join(f"{name} {value}" for name, value in self.parameters._asdict().items())


def variants(bank: Bank, tokens: int) -> Iterator[Variant]:
    """All variants for activations [1, tokens, width] in bf16."""
    width = bank.read.shape[-1]
    task = clamp(bank, M_TILES)
    default_tiles = edit_tiles.default_launch(tokens, M_TILES, torch.bfloat16)
    for tiles in TILES:
        yield Variant(f"edit_tiles M={M_TILES}", tiles, tiles == default_tiles, 2, _edit(edit_tiles, task, tiles), _edit_reference(task))
    task = clamp(bank, M_SCALAR)
    default_scalar = edit_scalar.default_launch(width)
    for tile_size in SCALAR_TILES.get(width, (1, 2)):
        scalar = ScalarLaunch(tile_size, warps_for(tile_size * width))
        is_default = scalar == default_scalar
        yield Variant(f"edit_scalar M={M_SCALAR}", scalar, is_default, 2, _edit(edit_scalar, task, scalar), _edit_reference(task))
    for stats in STATS:
        is_default = stats == default_stats_launch(tokens, M_TILES)
        yield Variant(f"drift_stats K={M_TILES}", stats, is_default, 1, _stats(bank, stats), _stats_reference(bank))


def clamp(bank: Bank, m: int) -> EditTask:
    """Raises the projections on m directions to their lower bounds."""
    weight = torch.ones(1, 1, device=bank.low.device)
    return EditTask(bank.read[None, :m], bank.write[None, :m], weight, None, EditNumbers(low=bank.low[None, :m]), EditOptions())


def _edit(kernel: Any, task: EditTask, parameters: Any) -> Callable[[Tensor, Tensor], Results]:
    def run(h: Tensor, out: Tensor) -> Results:
        kernel.launch_forward(h, task, out, None, None, parameters)
        return (out,)

    return run


def _edit_reference(task: EditTask) -> Callable[[Tensor], Results]:
    return lambda h: edit_reference(h.float(), task)[:1]


def _stats(bank: Bank, parameters: StatsLaunch) -> Callable[[Tensor, Tensor], Results]:
    weight = torch.ones(1, 1, device=bank.low.device)
    return lambda h, out: launch_stats(h, bank.read, weight, None, None, 0, True, True, parameters)


def _stats_reference(bank: Bank) -> Callable[[Tensor], Results]:
    weight = torch.ones(1, 1, device=bank.low.device)
    return lambda h: drift_stats_reference(h, bank.read, weight, None, None, 0, True, True)


def sweep(sizes: Sizes, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each kernel, width, number of tokens and variant: time on the device, and the fraction of the bandwidth of a copy that is
    reached, were only the unavoidable bytes moved. A variant is compared with PyTorch operations in fp32 before it is timed."""
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for width in WIDTHS if sizes.on_gpu else DRY_WIDTHS:
        all_tokens = TOKENS if sizes.on_gpu else DRY_TOKENS
        pool = sizes.random(2 * max(all_tokens), width).to(torch.bfloat16)  # more than the L2 cache holds, also in small pieces
        results = torch.empty_like(pool)
        bank = Bank(sizes.random(16, width, seed=1) / width**0.5, sizes.random(16, width, seed=2) / 8, 0.2 * sizes.random(16, seed=3))
        for tokens in all_tokens:
            pieces = list(zip(pool.split(tokens), results.split(tokens), strict=True))[:128]
            for variant in variants(bank, tokens):
                row = {"kernel": variant.kernel, "width": width, "tokens": tokens, "parameters": variant.label}
                row["default"] = "yes" if variant.is_default else ""
                if time.monotonic() - started > BUDGET:
                    rows.append({**row, "left out": "no time"})
                elif not sizes.on_gpu:
                    with mock.patch.object(LazyKernel, "launch", lambda self, grid, **arguments: None):
                        rows.append({**row, **_timed(variant, pieces, sizes, bandwidth)})
                elif _is_right(variant, *pieces[0]):
                    rows.append({**row, **_timed(variant, pieces, sizes, bandwidth)})
                else:
                    rows.append({**row, "left out": "wrong"})
        del pool, results, pieces
    return _against_default(rows)


def _is_right(variant: Variant, h: Tensor, out: Tensor) -> bool:
    h, out = h[None, :256], out[None, :256]  # [1, tokens, width]
    pairs = zip(variant.run(h, out), variant.reference(h), strict=True)
    return all(_relative_error(result.double(), expected.double()) <= TOLERANCE for result, expected in pairs)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))


def _timed(variant: Variant, pieces: list[tuple[Tensor, Tensor]], sizes: Sizes, bandwidth: float) -> dict[str, float]:
    h = pieces[0][0]
    ms = graph_milliseconds([lambda h=h, out=out: variant.run(h[None], out[None]) for h, out in pieces], sizes)  # type: ignore[misc]
    moved = variant.passes * h.numel() * h.element_size()
    return {"us": ms * 1e3, "fraction": moved / ms / 1e9 / bandwidth}


def _against_default(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how long a variant takes against the default of the same kernel, width and tokens."""
    defaults = {(row["kernel"], row["width"], row["tokens"]): row.get("us") for row in rows if row["default"]}
    for row in rows:
        default = defaults.get((row["kernel"], row["width"], row["tokens"]))
        if default and "us" in row:
            row["against default"] = row["us"] / default
    return rows


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest variant of each kernel, width and number of tokens."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["kernel"], row["width"], row["tokens"])
        if "us" in row and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return list(best.values())
