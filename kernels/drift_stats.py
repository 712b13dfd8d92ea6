"""Drift statistics: what a monitor wants to know of an activation, in one read.

Mathematics, over tokens t with weight w_t > 0 (the others may hold anything, nan too):

    n = sum w_t      sum_d = sum w_t h_td      m2_d = sum w_t (h_td - sum_d / n)^2
    |h_t|            p_tk = h_t.u_k            histogram_kb = number of tokens with p_tk in bin b of [low_k, high_k), the outer bins open

Squares are centred: a sum of squares minus the square of a sum is wrong in the first digit in fp32 where a channel's mean is 3,000 times
its deviation, and such channels are common in the residual stream. Each tile of tokens is centred on its own mean, in registers, and the
tiles are merged in fp64 by the formula of Chan, Golub and LeVeque (1983), so two results can be merged in the same way.

Shapes: h [batch, tokens, D] (fp32, bf16 or fp16; any row strides, any D; offsets in int64), u [K, D], w [batch or 1, tokens or 1]; sum,
m2 [D] fp64; norms [batch, tokens], projections [batch, tokens, K] fp32, 0 where w is 0; histogram [K, bins] int64.

Bytes per token in bf16: 2 D read once; D / 8 written and read again for the sums of tiles (8 D for each tile of 64 tokens; 4 times as much
for those of 16), 4 K + 4 for norms and projections. Projections go through the tensor cores with fp32 directions kept to 2^-16, see
`edit_tiles`.

Deterministic: tiles in a fixed order, and the only atomics count integers. Sources: Chan et al. for the merging; the column sums in two
stages are those of fused norm backward kernels (Hsu et al. 2024, arXiv 2410.10989).
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.kernels.available import KERNELS
from steer.kernels.device_functions import dot_exact
from steer.kernels.dispatch import can_run_triton, choose_path
from steer.kernels.drift_reference import StatsTensors, drift_stats_reference
from steer.kernels.layout import as_3d, bank_with_slots, broadcast_strides, contiguous_rows, next_power_of_2, token_weights
from steer.kernels.lazy_triton import tl, triton

MAX_DIRECTIONS = 64  # all of whose projections of a tile are held in registers
MIN_TOKENS_FOR_LARGE_TILES = 8192  # tiles of 64 are then 128 programs, one for nearly all of the 132 multiprocessors of a H100
MAX_DIRECTIONS_OF_LARGE_TILES = 32
MERGED_TILES = 64  # tiles that the merging kernel takes in a step
MERGED_COLUMNS = 32  # columns of one of its programs


@triton.jit
def _stats_kernel(
    h_ptr, directions_ptr, weight_ptr, low_ptr, bins_per_unit_ptr,
    tile_weight_ptr, tile_sum_ptr, tile_m2_ptr, norm_ptr, projection_ptr, histogram_ptr,
    n_tokens, n_rows, h_stride_b, h_stride_t, weight_stride_b, weight_stride_t,
    WIDTH: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr,
    TILE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens, of any rows; n_rows is batch x tokens."""
    tile = tl.program_id(0)
    row = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    in_batch = row < n_rows
    b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t, mask=in_batch, other=0.0).to(tl.float32)
    is_live = w > 0
    tile_weight = tl.sum(w, 0)
    tl.store(tile_weight_ptr + tile, tile_weight)
    h_offsets = (b * h_stride_b + t * h_stride_t)[:, None]
    tile_offset = tile.to(tl.int64) * WIDTH
    squares = tl.zeros((TILE_SIZE,), tl.float32)
    projections = tl.zeros((TILE_SIZE, BLOCK_K), tl.float32)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        h = tl.load(h_ptr + h_offsets + d[None, :], mask=is_live[:, None] & (d < WIDTH)[None, :], other=0.0)  # [TILE_SIZE, BLOCK_SIZE]
        x = h.to(tl.float32)
        if tile_sum_ptr is not None:
            tile_sum = tl.sum(w[:, None] * x, 0)
            centred = x - (tile_sum / tl.where(tile_weight > 0, tile_weight, 1.0))[None, :]
            tl.store(tile_sum_ptr + tile_offset + d, tile_sum, mask=d < WIDTH)
            tl.store(tile_m2_ptr + tile_offset + d, tl.sum(w[:, None] * centred * centred, 0), mask=d < WIDTH)
        if norm_ptr is not None:
            squares += tl.sum(x * x, 1)
        if directions_ptr is not None:
            u = tl.load(directions_ptr + k[None, :] * WIDTH + d[:, None], mask=(k < K)[None, :] & (d < WIDTH)[:, None], other=0.0)
            projections = dot_exact(h, u, projections)  # u [BLOCK_SIZE, BLOCK_K]
    if norm_ptr is not None:
        tl.store(norm_ptr + row, tl.sqrt(squares), mask=in_batch)
    if directions_ptr is not None:
        tl.store(projection_ptr + row.to(tl.int64)[:, None] * K + k[None, :], projections, mask=in_batch[:, None] & (k < K)[None, :])
    if histogram_ptr is not None:
        low = tl.load(low_ptr + k, mask=k < K, other=0.0)[None, :]
        bins_per_unit = tl.load(bins_per_unit_ptr + k, mask=k < K, other=0.0)[None, :]
        bin = tl.minimum(tl.maximum((projections - low) * bins_per_unit, 0.0), BINS - 1).to(tl.int32)
        is_counted = is_live[:, None] & (k < K)[None, :] & (projections == projections)
        tl.atomic_add(histogram_ptr + k[None, :] * BINS + bin, 1, mask=is_counted)


@triton.jit
def _merge_kernel(
    tile_weight_ptr, tile_sum_ptr, tile_m2_ptr, sum_ptr, m2_ptr, n_tiles, width,
    STEPS: tl.constexpr, TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Merges the tiles in fp64, one program for each block of columns: sums first, then squares around their mean."""
    d = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    n = tl.zeros((BLOCK_SIZE,), tl.float64)
    total = tl.zeros((BLOCK_SIZE,), tl.float64)
    for step in range(STEPS):
        tile = step * TILES + tl.arange(0, TILES)
        mask = (tile < n_tiles)[:, None] & (d < width)[None, :]
        offsets = tile.to(tl.int64)[:, None] * width + d[None, :]
        total += tl.sum(tl.load(tile_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float64), 0)
        n += tl.sum(tl.load(tile_weight_ptr + tile, mask=tile < n_tiles, other=0.0).to(tl.float64), 0)
    mean = total / tl.where(n > 0, n, 1.0)
    m2 = tl.zeros((BLOCK_SIZE,), tl.float64)
    for step in range(STEPS):
        tile = step * TILES + tl.arange(0, TILES)
        mask = (tile < n_tiles)[:, None] & (d < width)[None, :]
        offsets = tile.to(tl.int64)[:, None] * width + d[None, :]
        tile_weight = tl.load(tile_weight_ptr + tile, mask=tile < n_tiles, other=0.0).to(tl.float64)
        tile_sum = tl.load(tile_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        distance = tile_sum / tl.where(tile_weight > 0, tile_weight, 1.0)[:, None] - mean[None, :]
        tile_m2 = tl.load(tile_m2_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        m2 += tl.sum(tile_m2 + tile_weight[:, None] * distance * distance, 0)
    tl.store(sum_ptr + d, total, mask=d < width)
    tl.store(m2_ptr + d, m2, mask=d < width)


class StatsLaunch(NamedTuple):
    """Launch parameters; `benchmarks/gpu.py --only sweep` tries others than the default."""

    tile_size: int  # tokens of a program
    num_warps: int
    num_stages: int  # depth of the pipeline of loads


def default_launch(n_rows: int, k: int) -> StatsLaunch:
    """Tiles of 64 tokens where they occupy the whole card, of 16 below: 2,048 tokens in tiles of 64 would leave 100 of 132 multiprocessors
    without work. Tiles of 16 write four times the sums, so they are not taken above. From arithmetic, not from a measurement.

    More than 32 directions spill registers on sm_80 in tiles of 64, and exceed the shared memory of gfx942 with three stages.
    """
    if k > MAX_DIRECTIONS_OF_LARGE_TILES:
        return StatsLaunch(16, 4, 2)
    return StatsLaunch(64, 8, 3) if n_rows >= MIN_TOKENS_FOR_LARGE_TILES else StatsLaunch(16, 4, 3)


def launch(
    h: Tensor,
    directions: Tensor | None,
    weight: Tensor,
    low: Tensor | None,
    bins_per_unit: Tensor | None,
    bins: int,
    channels: bool,
    norms: bool,
    parameters: StatsLaunch | None = None,
) -> StatsTensors:
    """The statistics by the kernels. h [batch, tokens, width], weight [batch or 1, tokens or 1], low and bins_per_unit [K] fp32."""
    h = contiguous_rows(h)
    batch, tokens, width = h.shape
    k = 0 if directions is None else len(directions)
    tile_size, num_warps, num_stages = parameters or default_launch(batch * tokens, k)
    n_tiles = -(-batch * tokens // tile_size)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=h.device)

    tile_weight = empty(n_tiles)
    tile_sum = empty(n_tiles, width) if channels else None
    tile_m2 = empty(n_tiles, width) if channels else None
    total = torch.zeros(width if channels else 0, dtype=torch.float64, device=h.device)
    m2 = torch.zeros_like(total)
    norm = empty(batch, tokens) if norms else None
    projections = None if directions is None else empty(batch, tokens, k)
    histogram = torch.zeros(k, bins, dtype=torch.int32, device=h.device) if bins else None
    weight_stride_b, weight_stride_t = broadcast_strides(weight)
    if h.numel():
        _stats_kernel[(n_tiles,)](
            h_ptr=h,
            directions_ptr=None if directions is None else directions.contiguous(),
            weight_ptr=weight,
            low_ptr=low,
            bins_per_unit_ptr=bins_per_unit,
            tile_weight_ptr=tile_weight,
            tile_sum_ptr=tile_sum,
            tile_m2_ptr=tile_m2,
            norm_ptr=norm,
            projection_ptr=projections,
            histogram_ptr=histogram,
            n_tokens=tokens,
            n_rows=batch * tokens,
            h_stride_b=h.stride(0),
            h_stride_t=h.stride(1),
            weight_stride_b=weight_stride_b,
            weight_stride_t=weight_stride_t,
            WIDTH=width,
            K=k,
            BINS=max(bins, 1),
            TILE_SIZE=tile_size,
            BLOCK_K=max(next_power_of_2(k), 16),
            BLOCK_SIZE=min(max(next_power_of_2(width), 16), 32 if h.dtype == torch.float32 else 128),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if h.numel() and channels:
        _merge_kernel[(-(-width // MERGED_COLUMNS),)](
            tile_weight_ptr=tile_weight,
            tile_sum_ptr=tile_sum,
            tile_m2_ptr=tile_m2,
            sum_ptr=total,
            m2_ptr=m2,
            n_tiles=n_tiles,
            width=width,
            STEPS=next_power_of_2(-(-n_tiles // MERGED_TILES)),
            TILES=MERGED_TILES,
            BLOCK_SIZE=MERGED_COLUMNS,
            num_warps=4,
        )
    return StatsTensors(
        n=tile_weight.sum(dtype=torch.float64),
        sum=total,
        m2=m2,
        norms=_or_empty(norm, h),
        projections=_or_empty(projections, h),
        histogram=torch.empty(0, dtype=torch.long, device=h.device) if histogram is None else histogram.long(),
    )


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x


@torch.library.custom_op(
    "steer::drift_stats",
    mutates_args=(),
    schema="(Tensor h, Tensor? directions, Tensor weight, Tensor? low, Tensor? bins_per_unit, int bins, bool channels, bool norms)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _drift_stats(
    h: Tensor,
    directions: Tensor | None,
    weight: Tensor,
    low: Tensor | None,
    bins_per_unit: Tensor | None,
    bins: int,
    channels: bool,
    norms: bool,
) -> StatsTensors:
    read = launch if can_run_triton(h) else drift_stats_reference
    stats = read(h, directions, weight, low, bins_per_unit, bins, channels, norms)
    return StatsTensors(stats.n, *[result.clone() for result in stats[1:]])  # results of an operator must not share memory


@_drift_stats.register_fake
def _(
    h: Tensor,
    directions: Tensor | None,
    weight: Tensor,
    low: Tensor | None,
    bins_per_unit: Tensor | None,
    bins: int,
    channels: bool,
    norms: bool,
) -> StatsTensors:
    wide = torch.promote_types(h.dtype, torch.float32)
    width = h.shape[-1] if channels else 0
    k = 0 if directions is None else len(directions)
    return StatsTensors(
        n=h.new_empty((), dtype=torch.float64),
        sum=h.new_empty(width, dtype=torch.float64),
        m2=h.new_empty(width, dtype=torch.float64),
        norms=h.new_empty(h.shape[:2] if norms else (0,), dtype=wide),
        projections=h.new_empty((*h.shape[:2], k) if k else (0,), dtype=wide),
        histogram=h.new_empty((k, bins) if k and bins else (0,), dtype=torch.long),
    )


class DriftStats(NamedTuple):
    """What was read; None where it was not asked for.

    Attributes:
        n: [] fp64 sum of the weights. sum, m2: [width] fp64, of h, and of its squared distance from the mean.
        norms: [...] fp32. projections: [..., K] fp32. histogram: [K, bins] int64, of the projections.

    Example:
        >>> stats = steer.kernels.drift_stats(torch.randn(2, 7, 32), torch.randn(4, 32))
        >>> stats.n, stats.sum.shape, stats.projections.shape, stats.histogram
    """

    n: Tensor  # [] fp64, sum of the weights
    sum: Tensor | None  # [width] fp64
    m2: Tensor | None  # [width] fp64, centred squares
    norms: Tensor | None  # [...] fp32
    projections: Tensor | None  # [..., K] fp32
    histogram: Tensor | None  # [K, bins] int64


@KERNELS.register("drift_stats")
def drift_stats(
    h: Tensor,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    channels: bool = True,
    norms: bool = True,
    bins: int = 0,
    low: Tensor | float = -1.0,
    high: Tensor | float = 1.0,
) -> DriftStats:
    """Channel sums and centred squares, token norms, projections and their histograms in one read of an activation.

    Args:
        h: [..., width]; never differentiated.
        directions: [K, width] to project on.
        mask: weights that broadcast to [..., 1]; tokens of weight 0 are not looked at.
        channels, norms: whether sums and squares, and norms, are wanted.
        bins: of the histogram of each direction's projections, from `low` to `high`, one number or [K]; 0 for none.

    Raises:
        WidthError, ConfigError: shapes that do not fit, or a histogram without directions or with an empty range.

    Example:
        >>> stats = drift_stats(torch.randn(2, 7, 32), torch.randn(4, 32), bins=20, low=-3.0, high=3.0)
        >>> stats.projections.shape, stats.histogram.shape
        (torch.Size([2, 7, 4]), torch.Size([4, 20]))
    """
    if directions is not None:
        directions = bank_with_slots(directions, 2, h, "directions to project on")
    first_edge, bins_per_unit = _histogram_range(directions, bins, low, high) if bins else (None, None)
    has_kernel = directions is None or len(directions) <= MAX_DIRECTIONS
    path = choose_path(h, opaque=True) if has_kernel else "aten"
    read = drift_stats_reference if path == "aten" else launch if path == "triton" else torch.ops.steer.drift_stats
    with torch.no_grad():
        results = read(as_3d(h), directions, token_weights(h, 1.0, mask), first_edge, bins_per_unit, bins, channels, norms)
    stats = StatsTensors(*results)
    return DriftStats(
        n=stats.n,
        sum=stats.sum if channels else None,
        m2=stats.m2 if channels else None,
        norms=stats.norms.view(h.shape[:-1]) if norms else None,
        projections=None if directions is None else stats.projections.view(*h.shape[:-1], len(directions)),
        histogram=stats.histogram if bins else None,
    )


def _histogram_range(directions: Tensor | None, bins: int, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Start of the first bin and bins per unit, [K] fp32."""
    if directions is None or bins < 1:
        raise _histogram_error(directions, bins)
    if isinstance(low, float | int) and isinstance(high, float | int) and not low < high:
        raise _empty_range_error(low, high)
    k = len(directions)
    start = torch.as_tensor(low, dtype=torch.float32, device=directions.device)
    end = torch.as_tensor(high, dtype=torch.float32, device=directions.device)
    if any(edge.dim() > 1 or edge.numel() not in (1, k) for edge in (start, end)):
        raise _range_shape_error(start, end, k)
    return start.expand(k).contiguous(), (bins / (end - start)).expand(k).contiguous()


# ---- errors


def _histogram_error(directions: Tensor | None, bins: int) -> ConfigError:
    return ConfigError(
        "a histogram of projections needs directions and bins",
        expected="directions=[K, width], and at least one bin",
        found=f"{'no directions' if directions is None else 'directions'}, {bins} bins",
        remedy="pass both, or bins=0",
    )


def _empty_range_error(low: float, high: float) -> ConfigError:
    return ConfigError(
        "the range of a histogram is empty", expected="low < high", found=f"{low}, {high}", remedy="exchange them, or widen the range"
    )


def _range_shape_error(start: Tensor, end: Tensor, k: int) -> ConfigError:
    return ConfigError(
        "the range of a histogram does not fit the directions",
        expected=f"numbers, or [{k}]",
        found=[list(start.shape), list(end.shape)],
        remedy="give one number for all directions, or one for each",
    )
