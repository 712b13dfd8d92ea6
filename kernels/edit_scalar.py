"""The unified edit with tokens in registers, along few directions; mathematics in `edit.py`.

A program reads its tokens once, takes the inner product with one direction after the other in fp32, and writes once. The directions come
from the L1 cache while they fit (8 M D bytes: 4 directions of width 4,096 are 131 kB), and from the L2 cache above. There a program costs
8 M D bytes of its bandwidth: 262 kB for 4 directions of width 8,192, beside 32 kB of memory traffic for a token. Hence programs of several
tokens, which share what they read, and `edit_tiles` for many tokens along more directions.

The backward pass is the same loop with the directions' roles exchanged; with norm preservation it builds y again from p first.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from steer.kernels.device_functions import evaluate_phi
from steer.kernels.edit_task import EditTask, contiguous_number, kernel_arguments
from steer.kernels.layout import broadcast_strides, is_per_token, next_power_of_2
from steer.kernels.lazy_triton import tl, triton

MAX_DIRECTIONS = 16
MAX_WIDTH = 16384  # columns, all of them in registers
CACHED_DIRECTIONS = 4  # directions up to which the L1 cache holds them
MIN_TILED_TOKENS = 1024  # tokens that are worth tiles


def is_suitable(x: Tensor, task: EditTask) -> bool:
    """This kernel takes the edit, and is the better one for it."""
    n_directions = task.read.shape[1]
    if n_directions > MAX_DIRECTIONS or x.shape[-1] > MAX_WIDTH:
        return False
    if task.options.preserve_norm or is_per_token(task.slots):
        return True
    return n_directions <= CACHED_DIRECTIONS or x.shape[0] * x.shape[1] < MIN_TILED_TOKENS


@triton.jit
def _forward_kernel(
    h_ptr, out_ptr, read_ptr, write_ptr, weight_ptr, slots_ptr,
    bias_ptr, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, p_ptr, h_norm_ptr,
    n_tokens, n_slots, scale_minus_1,
    h_stride_b, h_stride_t, weight_stride_b, weight_stride_t, slots_stride_b, slots_stride_t, read_stride_s, write_stride_s,
    WIDTH: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, PRESERVE_NORM: tl.constexpr,
    TILE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens, which are of one row and share its slot."""
    tiles_per_row = tl.cdiv(n_tokens, TILE_SIZE)
    b = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    first_t = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE_SIZE
    t = first_t + tl.arange(0, TILE_SIZE)
    in_row = t < n_tokens
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t, mask=in_row, other=0.0).to(tl.float32)
    number_offset = b * 0
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b + first_t * slots_stride_t).to(tl.int64)
        is_known = (slot >= 0) & (slot < n_slots)
        w = tl.where(is_known, w, 0.0)
        slot = tl.where(is_known, slot, 0)
        number_offset = slot * M
        read_ptr += slot * read_stride_s
        write_ptr += slot * write_stride_s
    row = b * n_tokens + t
    d = tl.arange(0, BLOCK_SIZE)[None, :]
    in_width = d < WIDTH
    mask = in_width if TILE_SIZE == 1 else in_row[:, None] & in_width  # a tile of one token is always in its row
    h = tl.load(h_ptr + (b * h_stride_b + t * h_stride_t)[:, None] + d, mask=mask, other=0.0).to(tl.float32)  # [TILE_SIZE, BLOCK_SIZE]
    h_squared = tl.sum(h * h, 1)
    threshold_unit = tl.full((TILE_SIZE,), 1.0, tl.float32)
    if RELATIVE:
        threshold_unit = tl.sqrt(h_squared)
        if h_norm_ptr is not None:
            tl.store(h_norm_ptr + row, threshold_unit, mask=in_row)
    y = h
    for j in range(M):
        p = tl.sum(h * tl.load(read_ptr + j * WIDTH + d, mask=in_width, other=0.0).to(tl.float32), 1)  # [TILE_SIZE]
        if bias_ptr is not None:
            p += tl.load(bias_ptr + number_offset + j)
        if p_ptr is not None:
            tl.store(p_ptr + row * M + j, p, mask=in_row)
        phi, _ = evaluate_phi(
            p, number_offset + j, None, threshold_unit, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1, GATED
        )
        y += (w * phi)[:, None] * tl.load(write_ptr + j * WIDTH + d, mask=in_width, other=0.0).to(tl.float32)
    if PRESERVE_NORM:
        y_squared = tl.sum(y * y, 1)
        y = y * (tl.sqrt(h_squared) / tl.where(y_squared > 0, tl.sqrt(y_squared), 1.0))[:, None]
    y = tl.where((w != 0)[:, None], y, h)
    tl.store(out_ptr + (row * WIDTH)[:, None] + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    g_ptr, h_ptr, dh_ptr, dy_ptr, q_ptr, read_ptr, write_ptr, weight_ptr, slots_ptr,
    scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, p_ptr, h_norm_ptr,
    n_tokens, n_slots, scale_minus_1, g_stride_b, g_stride_t, h_stride_b, h_stride_t,
    weight_stride_b, weight_stride_t, slots_stride_b, slots_stride_t, read_stride_s, write_stride_s,
    WIDTH: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, PRESERVE_NORM: tl.constexpr,
    TILE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens, as in the forward pass; h only to keep the norm, p where phi' depends on it."""
    tiles_per_row = tl.cdiv(n_tokens, TILE_SIZE)
    b = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    first_t = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE_SIZE
    t = first_t + tl.arange(0, TILE_SIZE)
    in_row = t < n_tokens
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t, mask=in_row, other=0.0).to(tl.float32)
    number_offset = b * 0
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b + first_t * slots_stride_t).to(tl.int64)
        is_known = (slot >= 0) & (slot < n_slots)
        w = tl.where(is_known, w, 0.0)
        slot = tl.where(is_known, slot, 0)
        number_offset = slot * M
        read_ptr += slot * read_stride_s
        write_ptr += slot * write_stride_s
    row = b * n_tokens + t
    d = tl.arange(0, BLOCK_SIZE)[None, :]
    in_width = d < WIDTH
    mask = in_width if TILE_SIZE == 1 else in_row[:, None] & in_width  # a tile of one token is always in its row
    out_offsets = (row * WIDTH)[:, None] + d
    g = tl.load(g_ptr + (b * g_stride_b + t * g_stride_t)[:, None] + d, mask=mask, other=0.0).to(tl.float32)  # [TILE_SIZE, BLOCK_SIZE]
    threshold_unit = tl.full((TILE_SIZE,), 1.0, tl.float32)
    if RELATIVE:
        threshold_unit = tl.load(h_norm_ptr + row, mask=in_row, other=1.0)
    dy = g
    dh = g
    if PRESERVE_NORM:
        h = tl.load(h_ptr + (b * h_stride_b + t * h_stride_t)[:, None] + d, mask=mask, other=0.0).to(tl.float32)
        y = h
        for j in range(M):
            p = tl.load(p_ptr + row * M + j, mask=in_row, other=0.0)
            phi, _ = evaluate_phi(
                p, number_offset + j, None, threshold_unit, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1, GATED
            )
            y += (w * phi)[:, None] * tl.load(write_ptr + j * WIDTH + d, mask=in_width, other=0.0).to(tl.float32)
        h_norm = tl.sqrt(tl.sum(h * h, 1))
        y_norm = tl.sqrt(tl.sum(y * y, 1))
        g_y = tl.sum(g * y, 1)
        divisor = tl.where(y_norm > 0, y_norm, 1.0)
        dy = (g - (g_y / (divisor * divisor))[:, None] * y) * (h_norm / divisor)[:, None]
        dh = dy + (g_y / (tl.where(h_norm > 0, h_norm, 1.0) * divisor))[:, None] * h
        if dy_ptr is not None:
            tl.store(dy_ptr + out_offsets, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    for j in range(M):
        q = tl.sum(dy * tl.load(write_ptr + j * WIDTH + d, mask=in_width, other=0.0).to(tl.float32), 1)  # [TILE_SIZE]
        if q_ptr is not None:
            tl.store(q_ptr + row * M + j, q, mask=in_row)
        p = q  # its value does not matter where phi is linear
        if p_ptr is not None:
            p = tl.load(p_ptr + row * M + j, mask=in_row, other=0.0)
        _, slope = evaluate_phi(
            p, number_offset + j, None, threshold_unit, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1, GATED
        )
        dh += (w * slope * q)[:, None] * tl.load(read_ptr + j * WIDTH + d, mask=in_width, other=0.0).to(tl.float32)
    dh = tl.where((w != 0)[:, None], dh, g)
    tl.store(dh_ptr + out_offsets, dh.to(dh_ptr.dtype.element_ty), mask=mask)


class ScalarLaunch(NamedTuple):
    """Launch parameters; `benchmarks/gpu.py --only sweep` tries others than the default."""

    tile_size: int  # tokens of a program; 1 for slots of tokens
    num_warps: int


def default_launch(width: int) -> ScalarLaunch:
    """One token for each program; 16 bf16 numbers, two 128-bit loads, for each thread, and more up to 16 warps.

    Two tokens would halve what is read of the L2 cache where the directions do not fit into L1, and compile without spilled registers at
    width 4,096. But at 8,192, where it matters most, they spill when p is kept for the backward pass, so the card has to decide.
    """
    return ScalarLaunch(1, warps_for(width))


def warps_for(numbers: int) -> int:
    """Warps of a program that holds so many columns, over all of its tokens."""
    return min(max(next_power_of_2(numbers) // 512, 1), 16)


def launch_forward(
    h: Tensor, task: EditTask, out: Tensor, p: Tensor | None, h_norm: Tensor | None, parameters: ScalarLaunch | None = None
) -> None:
    """Fills out, p [batch, tokens, M] and h_norm [batch, tokens]. The directions are contiguous, and the numbers of h's tokens."""
    batch, tokens, width = h.shape
    tile_size, num_warps = parameters or default_launch(width)
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
        slots_stride_t=broadcast_strides(task.slots)[1],
        **arguments,
        WIDTH=width,
        PRESERVE_NORM=task.options.preserve_norm,
        TILE_SIZE=tile_size,
        BLOCK_SIZE=next_power_of_2(width),
        num_warps=num_warps,
    )


def launch_backward(
    g: Tensor,
    h: Tensor | None,
    task: EditTask,
    p: Tensor | None,
    h_norm: Tensor | None,
    dh: Tensor,
    q: Tensor | None,
    dy: Tensor | None,
    parameters: ScalarLaunch | None = None,
) -> None:
    """Fills dh, q [batch, tokens, M] and dy, the latter two where they are wanted."""
    batch, tokens, width = g.shape
    tile_size, num_warps = parameters or default_launch(width)
    h_stride_b, h_stride_t = broadcast_strides(h)
    _backward_kernel[(batch * -(-tokens // tile_size),)](
        g_ptr=g,
        h_ptr=h,
        dh_ptr=dh,
        dy_ptr=dy,
        q_ptr=q,
        p_ptr=p,
        h_norm_ptr=h_norm,
        n_tokens=tokens,
        g_stride_b=g.stride(0),
        g_stride_t=g.stride(1),
        h_stride_b=h_stride_b,
        h_stride_t=h_stride_t,
        slots_stride_t=broadcast_strides(task.slots)[1],
        **kernel_arguments(task),
        WIDTH=width,
        PRESERVE_NORM=task.options.preserve_norm,
        TILE_SIZE=tile_size,
        BLOCK_SIZE=next_power_of_2(width),
        num_warps=num_warps,
    )
