"""The unified edit for many tokens and directions at once, through the tensor cores; mathematics in `edit.py`.

A program takes a tile of tokens of one row. It sweeps over the columns twice: to read all projections p (or q), and to write. The second
sweep finds the tile in the L2 cache, where it still is, so that memory sees each token read and written once; the directions are read once
for each tile (8 M D bytes in fp32, from L2), not once for each token as in `edit_scalar`.

Precision: products of half-precision activations with fp32 directions are exact to 2^-16 and accumulate in fp32: what a direction loses
when it is rounded to the dtype of the activation is multiplied in a second product (and the same for phi). Directions in half precision
take one, and more than 64 of them are rounded to it.

Norms are not kept here, and a row's tokens share its slot.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.kernels.device_functions import dot_exact, evaluate_phi
from steer.kernels.edit_task import EditTask, contiguous_number, kernel_arguments
from steer.kernels.layout import next_power_of_2
from steer.kernels.lazy_triton import tl, triton

MAX_DIRECTIONS = 256  # the projections of a tile of tokens are held in registers
MAX_EXACT_DIRECTIONS = 64  # fp32 directions up to which none is rounded to the dtype of the activation: two products, twice the registers


@triton.jit
def _project_tile(
    x_ptr, t, x_stride_t, in_row, bank_ptr, j, in_m,
    WIDTH: tl.constexpr, SQUARES: tl.constexpr, TILE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """First sweep: inner products of the tile's tokens with the directions, [TILE_SIZE, BLOCK_M], and with SQUARES also |x|^2."""
    projections = tl.zeros((TILE_SIZE, BLOCK_M), tl.float32)
    squares = tl.zeros((TILE_SIZE,), tl.float32)
    for start in range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + t[:, None] * x_stride_t + d[None, :], mask=in_row[:, None] & (d < WIDTH)[None, :], other=0.0)
        if SQUARES:
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        u = tl.load(bank_ptr + j[None, :] * WIDTH + d[:, None], mask=in_m[None, :] & (d < WIDTH)[:, None], other=0.0)
        projections = dot_exact(x, u, projections)  # u [BLOCK_SIZE, BLOCK_M]
    return projections, squares


@triton.jit
def _write_tile(
    x_ptr, t, x_stride_t, in_row, row, out_ptr, coefficients, w, bank_ptr, j, in_m,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Second sweep: out = x + coefficients [TILE_SIZE, BLOCK_M] times the directions; a token of weight 0 stays as it is.

    REVERSE goes from the last column to the first: what the first sweep has read last is most likely still in a cache.
    """
    dtype = out_ptr.dtype.element_ty
    last_start: tl.constexpr = (WIDTH - 1) // BLOCK_SIZE * BLOCK_SIZE
    for offset in range(0, WIDTH, BLOCK_SIZE):
        start = last_start - offset if REVERSE else offset
        d = start + tl.arange(0, BLOCK_SIZE)
        mask = in_row[:, None] & (d < WIDTH)[None, :]
        x = tl.load(x_ptr + t[:, None] * x_stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(bank_ptr + j[:, None] * WIDTH + d[None, :], mask=in_m[:, None] & (d < WIDTH)[None, :], other=0.0)
        y = dot_exact(coefficients.to(dtype), v, x)  # v [BLOCK_M, BLOCK_SIZE]
        if dtype != tl.float32:  # what the coefficients have lost by rounding
            y = tl.dot((coefficients - coefficients.to(dtype).to(tl.float32)).to(dtype), v.to(dtype), y)
        y = tl.where((w != 0)[:, None], y, x)
        tl.store(out_ptr + row[:, None] * WIDTH + d[None, :], y.to(dtype), mask=mask)


@triton.jit
def _forward_kernel(
    h_ptr, out_ptr, read_ptr, write_ptr, weight_ptr, slots_ptr,
    bias_ptr, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, p_ptr, h_norm_ptr,
    n_tokens, n_slots, scale_minus_1,
    h_stride_b, h_stride_t, weight_stride_b, weight_stride_t, slots_stride_b, read_stride_s, write_stride_s,
    WIDTH: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
    TILE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens."""
    tiles_per_row = tl.cdiv(n_tokens, TILE_SIZE)
    b = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    t = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    in_row = t < n_tokens
    j = tl.arange(0, BLOCK_M)
    in_m = j < M
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t, mask=in_row, other=0.0).to(tl.float32)
    number_offsets = j
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b).to(tl.int64)
        is_known = (slot >= 0) & (slot < n_slots)
        w = tl.where(is_known, w, 0.0)
        slot = tl.where(is_known, slot, 0)
        number_offsets = slot * M + j
        read_ptr += slot * read_stride_s
        write_ptr += slot * write_stride_s
    h_ptr += b * h_stride_b
    row = b * n_tokens + t
    p, h_squared = _project_tile(h_ptr, t, h_stride_t, in_row, read_ptr, j, in_m, WIDTH, RELATIVE, TILE_SIZE, BLOCK_M, BLOCK_SIZE)
    if bias_ptr is not None:
        p += tl.load(bias_ptr + number_offsets, mask=in_m, other=0.0)[None, :]
    if p_ptr is not None:
        tl.store(p_ptr + row[:, None] * M + j[None, :], p, mask=in_row[:, None] & in_m[None, :])
    threshold_unit = tl.full((TILE_SIZE,), 1.0, tl.float32)
    if RELATIVE:
        threshold_unit = tl.sqrt(h_squared)
        if h_norm_ptr is not None:
            tl.store(h_norm_ptr + row, threshold_unit, mask=in_row)
    phi, _ = evaluate_phi(
        p, number_offsets[None, :], in_m[None, :], threshold_unit[:, None],
        scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1, GATED,
    )  # fmt: skip
    phi = tl.where(in_m[None, :], w[:, None] * phi, 0.0)
    _write_tile(h_ptr, t, h_stride_t, in_row, row, out_ptr, phi, w, write_ptr, j, in_m, WIDTH, REVERSE, BLOCK_SIZE)


@triton.jit
def _backward_kernel(
    g_ptr, dh_ptr, q_ptr, read_ptr, write_ptr, weight_ptr, slots_ptr,
    scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, p_ptr, h_norm_ptr,
    n_tokens, n_slots, scale_minus_1,
    g_stride_b, g_stride_t, weight_stride_b, weight_stride_t, slots_stride_b, read_stride_s, write_stride_s,
    WIDTH: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
    TILE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens; p where phi' depends on it."""
    tiles_per_row = tl.cdiv(n_tokens, TILE_SIZE)
    b = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    t = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    in_row = t < n_tokens
    j = tl.arange(0, BLOCK_M)
    in_m = j < M
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t, mask=in_row, other=0.0).to(tl.float32)
    number_offsets = j
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b).to(tl.int64)
        is_known = (slot >= 0) & (slot < n_slots)
        w = tl.where(is_known, w, 0.0)
        slot = tl.where(is_known, slot, 0)
        number_offsets = slot * M + j
        read_ptr += slot * read_stride_s
        write_ptr += slot * write_stride_s
    g_ptr += b * g_stride_b
    row = b * n_tokens + t
    q, _ = _project_tile(g_ptr, t, g_stride_t, in_row, write_ptr, j, in_m, WIDTH, False, TILE_SIZE, BLOCK_M, BLOCK_SIZE)
    mask = in_row[:, None] & in_m[None, :]
    if q_ptr is not None:
        tl.store(q_ptr + row[:, None] * M + j[None, :], q, mask=mask)
    p = q  # its value does not matter where phi is linear
    if p_ptr is not None:
        p = tl.load(p_ptr + row[:, None] * M + j[None, :], mask=mask, other=0.0)
    threshold_unit = tl.full((TILE_SIZE,), 1.0, tl.float32)
    if RELATIVE:
        threshold_unit = tl.load(h_norm_ptr + row, mask=in_row, other=1.0)
    _, slope = evaluate_phi(
        p, number_offsets[None, :], in_m[None, :], threshold_unit[:, None],
        scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1, GATED,
    )  # fmt: skip
    coefficients = tl.where(in_m[None, :], w[:, None] * slope * q, 0.0)
    _write_tile(g_ptr, t, g_stride_t, in_row, row, dh_ptr, coefficients, w, read_ptr, j, in_m, WIDTH, REVERSE, BLOCK_SIZE)


class TilesLaunch(NamedTuple):
    """Launch parameters; `benchmarks/gpu.py --only sweep` tries others than the default."""

    tile_size: int  # tokens of a program
    block_size: int  # columns of a step
    reverse: bool  # the second sweep goes from the last column to the first
    num_warps: int
    num_stages: int  # depth of the pipeline of loads


def default_launch(tokens: int, m: int, dtype: torch.dtype) -> TilesLaunch:
    """What compiles without spilled registers for sm_80, sm_90 and gfx942, in 48 kB of shared memory up to 64 directions, 100 kB up to 256.

    The second sweep is reversed because of how caches work, not because of a measurement: with tiles of 64 tokens, 8,192 tokens of width
    4,096 are all in flight at once, 64 MiB in bf16 against the 50 MB of L2 of a H100. A cache that drops what was used least recently has
    then lost the first columns, and a second sweep from the front would drop each column just before it comes to it.
    """
    directions = max(next_power_of_2(m), 16)
    is_fp32 = dtype == torch.float32
    return TilesLaunch(
        tile_size=max(16, min(next_power_of_2(tokens), 32 if is_fp32 else 64)),
        block_size=32 if directions > 32 or is_fp32 else 64,
        reverse=True,
        num_warps=8 if directions > 64 and torch.version.hip is None else 4,
        num_stages=2 if directions > 32 else 3,
    )


def launch_forward(
    h: Tensor, task: EditTask, out: Tensor, p: Tensor | None, h_norm: Tensor | None, parameters: TilesLaunch | None = None
) -> None:
    """Fills out, p [batch, tokens, M] and h_norm [batch, tokens]. The directions are contiguous, and the numbers of h's tokens."""
    h, task = _prepare(h, task)
    batch, tokens, width = h.shape
    m = task.read.shape[1]
    tile_size, block_size, reverse, num_warps, num_stages = parameters or default_launch(tokens, m, h.dtype)
    arguments = kernel_arguments(task)
    bias = task.numbers.bias
    _forward_kernel[(batch * -(-tokens // tile_size),)](
        h_ptr=h,
        out_ptr=out,
        bias_ptr=None if bias is None else contiguous_number(bias, arguments["n_slots"]),
        p_ptr=p,
        h_norm_ptr=h_norm,
        n_tokens=tokens,
        h_stride_b=h.stride(0),
        h_stride_t=h.stride(1),
        **arguments,
        WIDTH=width,
        REVERSE=reverse,
        TILE_SIZE=tile_size,
        BLOCK_M=max(next_power_of_2(m), 16),
        BLOCK_SIZE=block_size,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def launch_backward(
    g: Tensor,
    task: EditTask,
    p: Tensor | None,
    h_norm: Tensor | None,
    dh: Tensor,
    q: Tensor | None,
    parameters: TilesLaunch | None = None,
) -> None:
    """Fills dh, and q [batch, tokens, M] where it is wanted."""
    g, task = _prepare(g, task)
    batch, tokens, width = g.shape
    m = task.read.shape[1]
    tile_size, block_size, reverse, num_warps, num_stages = parameters or default_launch(tokens, m, g.dtype)
    _backward_kernel[(batch * -(-tokens // tile_size),)](
        g_ptr=g,
        dh_ptr=dh,
        q_ptr=q,
        p_ptr=p,
        h_norm_ptr=h_norm,
        n_tokens=tokens,
        g_stride_b=g.stride(0),
        g_stride_t=g.stride(1),
        **kernel_arguments(task),
        WIDTH=width,
        REVERSE=reverse,
        TILE_SIZE=tile_size,
        BLOCK_M=max(next_power_of_2(m), 16),
        BLOCK_SIZE=block_size,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _prepare(x: Tensor, task: EditTask) -> tuple[Tensor, EditTask]:
    """The activation as one row where its rows lie one behind the other, so that tiles are full; many directions in its dtype."""
    if task.slots is None and x.shape[0] > 1 and x.stride(0) == x.shape[1] * x.stride(1):
        if task.weight.numel() > 1:
            task = task._replace(weight=task.weight.expand(x.shape[:2]).reshape(1, -1))  # [1, batch * tokens]
        x = x.flatten(0, 1)[None]  # [1, batch * tokens, width]
    if task.read.shape[1] > MAX_EXACT_DIRECTIONS:
        task = task._replace(read=task.read.to(x.dtype), write=task.write.to(x.dtype))
    return x, task
