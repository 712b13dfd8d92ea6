"""Gradients of banks of vectors: weighted sums of activations over the tokens of each slot.

Mathematics: out[s, m] = sum over tokens t with slot(t) = s of c[t, m] * x[t], the gradient of y[t] = sum_m c[t, m] v[slot(t), m] with
respect to v, for x = dL/dy.

Shapes: x [batch, tokens, width] in any float dtype and row stride, c [batch, tokens, M] fp32, slots [batch, 1 or tokens]; out
[slots, M, width] fp32.

Bytes per token: 2 x width read once for M = 1 in bf16 (the M programs on one tile follow one another, so that the others find it in the L2
cache), and nothing written but the sums. A call costs slots x tokens looks at slot numbers, which are read in tiles of 32.

Deterministic: no atomics; each program adds its tokens in order, and the partial sums of the programs are added in order. The division of
work depends on shapes alone, so the bits are the same on every GPU of one kind.

Source: the transpose of an embedding bag; the division into partial sums is that of the weight gradient of Liger Kernel's RMSNorm (Hsu et
al. 2024, arXiv 2410.10989, section 3.2).
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.kernels.layout import broadcast_strides, contiguous_rows, next_power_of_2
from steer.kernels.lazy_triton import tl, triton

TILE_SIZE = 32  # tokens that a program looks at together
MAX_PROGRAMS = 512  # about four for each of the 132 multiprocessors of a H100
MAX_BLOCK_SIZE = 256  # columns of a program


@triton.jit
def _sum_kernel(
    x_ptr, c_ptr, slots_ptr, out_ptr,
    n_tokens, n_rows, x_stride_b, x_stride_t, c_stride_b, c_stride_t, slots_stride_b, slots_stride_t,
    WIDTH: tl.constexpr, M: tl.constexpr, TILES_PER_PART: tl.constexpr, TILE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program (slot and m, part of the tokens, block of columns); n_rows is batch x tokens."""
    vector = tl.program_id(0)
    slot, m = vector // M, vector % M
    d = tl.program_id(2) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros((TILE_SIZE, BLOCK_SIZE), tl.float32)
    for tile in range(TILES_PER_PART):
        row = (tl.program_id(1) * TILES_PER_PART + tile) * TILE_SIZE + tl.arange(0, TILE_SIZE)
        b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
        in_slot = row < n_rows
        if slots_ptr is not None:
            in_slot = in_slot & (tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t, mask=in_slot, other=-1) == slot)
        if tl.max(in_slot.to(tl.int32), 0) > 0:  # most tiles have no token of this slot
            c = tl.load(c_ptr + b * c_stride_b + t * c_stride_t + m, mask=in_slot, other=0.0)
            offsets = (b * x_stride_b + t * x_stride_t)[:, None] + d[None, :]
            sums += c[:, None] * tl.load(x_ptr + offsets, mask=in_slot[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)
    out_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + vector) * WIDTH
    tl.store(out_ptr + d, tl.sum(sums, 0), mask=d < WIDTH)


class WorkDivision(NamedTuple):
    """How a sum is divided among programs."""

    block_size: int  # columns of a program
    n_parts: int  # parts of the tokens
    tiles_per_part: int  # a power of two, so that few kernels are compiled


def divide_work(n_rows: int, n_vectors: int, width: int) -> WorkDivision:
    """The division for sums of `n_rows` tokens into `n_vectors` vectors."""
    block_size = min(next_power_of_2(width), MAX_BLOCK_SIZE)
    n_blocks = -(-width // block_size)
    n_tiles = -(-n_rows // TILE_SIZE)
    n_parts = max(1, min(-(-n_tiles // 8), MAX_PROGRAMS // (n_vectors * n_blocks)))
    tiles_per_part = next_power_of_2(-(-n_tiles // n_parts))
    return WorkDivision(block_size, -(-n_tiles // tiles_per_part), tiles_per_part)


def weighted_sum(x: Tensor, c: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """Sums of x weighted by c over the tokens of each of `count` slots, [count, M, width] fp32, on a GPU; see the top of this file."""
    (batch, tokens, width), m = x.shape, c.shape[-1]
    if slots is None and count > 1:  # all tokens have the first slot
        first = weighted_sum(x, c, None, 1)
        return torch.cat([first, torch.zeros(count - 1, m, width, dtype=torch.float32, device=x.device)])
    x = contiguous_rows(x)
    c = contiguous_rows(c.float())
    c_stride_b, c_stride_t = broadcast_strides(c)
    slots_stride_b, slots_stride_t = broadcast_strides(slots)
    division = divide_work(batch * tokens, count * m, width)
    parts = torch.empty(division.n_parts, count, m, width, dtype=torch.float32, device=x.device)
    _sum_kernel[(count * m, division.n_parts, -(-width // division.block_size))](
        x_ptr=x,
        c_ptr=c,
        slots_ptr=slots,
        out_ptr=parts,
        n_tokens=tokens,
        n_rows=batch * tokens,
        x_stride_b=x.stride(0),
        x_stride_t=x.stride(1),
        c_stride_b=c_stride_b,
        c_stride_t=c_stride_t,
        slots_stride_b=slots_stride_b,
        slots_stride_t=slots_stride_t,
        WIDTH=width,
        M=m,
        TILES_PER_PART=division.tiles_per_part,
        TILE_SIZE=TILE_SIZE,
        BLOCK_SIZE=division.block_size,
        num_warps=4,
    )
    return parts.sum(0)  # [count, M, width]


def weighted_sum_reference(x: Tensor, c: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """The same sums in PyTorch operations, in fp32 at least."""
    wide = torch.promote_types(x.dtype, c.dtype)
    slots = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device) if slots is None else slots
    is_member = (slots[..., None] == torch.arange(count, device=x.device)).to(wide)  # [batch, 1 or tokens, count]
    return torch.einsum("bts,btm,btd->smd", is_member.expand(*x.shape[:2], count), c.to(wide), x.to(wide))
