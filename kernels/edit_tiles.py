"""The unified edit for many tokens and directions at once, through the tensor cores; mathematics in `edit.py`.

A program takes a tile of tokens of one row. It goes over the columns twice: to read all numbers p (or q), and to write. The second time
the tile comes from the L2 cache, so that memory sees each token read and written once; the directions are read once for each tile (8 M D
bytes in fp32, from L2), not once for each token as in `edit_scalar`.

Precision: products of half-precision activations with fp32 directions are exact to 2^-16 and accumulate in fp32: what a direction loses
when it is rounded to the type of the activation is multiplied in a second product (and the same for phi). Directions in half precision
take one, and more than 64 of them are rounded to it.

Norms are not kept here, and a row's tokens share its slot.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.kernels.edit_scalar import change  # noqa: F401  (a part of the kernel below)
from steer.kernels.jit import inline, jit
from steer.kernels.layout import power_of_two, strides

if TYPE_CHECKING:
    import triton.language as tl

MOST = 256  # directions: their numbers for a tile of tokens are held in registers
EXACT = 64  # directions up to which fp32 ones are not rounded to the type of the activation: two products and twice the registers


@inline
def product(a, b, sums):
    """sums + a b for a in the type of the activation; b may be wider."""
    if a.dtype == tl.float32:
        sums = tl.dot(a, b.to(tl.float32), sums, input_precision="ieee")
    else:
        rounded = b.to(a.dtype)
        sums = tl.dot(a, rounded, sums)
        if b.dtype == tl.float32:
            sums = tl.dot(a, (b - rounded.to(tl.float32)).to(a.dtype), sums)
    return sums


@jit
def _edit(
    x, out, q, first, second, weight, slots, bias, scale, shift, low, high, threshold, p, length,
    tokens, count, gain, x_b, x_t, weight_b, weight_t, slots_b, first_s, second_s,
    D: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr,
    TILE: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, row). Forward: x is h, first U, second W. Backward: x is g, first W, second U."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    kept = t < tokens
    t = t.to(tl.int64)
    j = tl.arange(0, DIRECTIONS)
    known = j < M
    w = tl.load(weight + b * weight_b + t * weight_t, mask=kept, other=0.0).to(tl.float32)
    at = j
    if slots is not None:
        slot = tl.load(slots + b * slots_b).to(tl.int64)
        there = (slot >= 0) & (slot < count)
        w = tl.where(there, w, 0.0)
        slot = tl.where(there, slot, 0)
        at = slot * M + j
        first += slot * first_s
        second += slot * second_s
    x += b * x_b
    squares = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, DIRECTIONS), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        tile = tl.load(x + t[:, None] * x_t + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0)
        if RELATIVE and not BACKWARD:
            squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        sums = product(tile, tl.load(first + j[None, :] * D + d[:, None], mask=known[None, :] & (d < D)[:, None], other=0.0), sums)
    read = sums
    row = b * tokens + t
    places = row[:, None] * M + j[None, :]
    both = kept[:, None] & known[None, :]
    reach = tl.full((TILE,), 1.0, tl.float32)
    if BACKWARD:
        if q is not None:
            tl.store(q + places, sums, mask=both)
        if p is not None:
            read = tl.load(p + places, mask=both, other=0.0)
        if RELATIVE:
            reach = tl.load(length + row, mask=kept, other=1.0)
    else:
        if bias is not None:
            read += tl.load(bias + at, mask=known, other=0.0)[None, :]
        if p is not None:
            tl.store(p + places, read, mask=both)
        if RELATIVE:
            reach = tl.sqrt(squares)
            if length is not None:
                tl.store(length + row, reach, mask=kept)
    phi, slope = change(read, at[None, :], known[None, :], reach[:, None], scale, shift, low, high, threshold, gain, GATED)
    share = slope * sums if BACKWARD else phi
    share = tl.where(known[None, :], w[:, None] * share, 0.0)
    kind = out.dtype.element_ty
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = kept[:, None] & (d < D)[None, :]
        tile = tl.load(x + t[:, None] * x_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
        vectors = tl.load(second + j[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        made = product(share.to(kind), vectors, tile)
        if kind != tl.float32:
            made = tl.dot((share - share.to(kind).to(tl.float32)).to(kind), vectors.to(kind), made)
        made = tl.where((w != 0)[:, None], made, tile)
        tl.store(out + row[:, None] * D + d[None, :], made.to(kind), mask=inside)


def shape_of(tokens: int, m: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens, directions and columns of a program, its warps and the depth of its pipeline: what compiles without spilled registers for
    sm_80, sm_90 and gfx942, in 48 kB of shared memory up to 64 directions and 100 kB up to 256."""
    directions, narrow = max(power_of_two(m), 16), dtype == torch.float32
    tile = max(16, min(power_of_two(tokens), 32 if narrow else 64))
    block = 32 if directions > 32 or narrow else 64
    warps = 8 if directions > 64 and torch.version.hip is None else 4
    return {"TILE": tile, "DIRECTIONS": directions, "BLOCK": block, "num_warps": warps, "num_stages": 2 if directions > 32 else 3}


def launch(
    x: Tensor,
    h: None,
    out: Tensor,
    dy: None,
    q: Tensor | None,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    slots: Tensor | None,
    numbers: tuple[Tensor | None, ...],
    options: tuple[float, bool, bool, bool],
    p: Tensor | None,
    length: Tensor | None,
    count: int,
    backward: bool,
) -> None:
    """Runs the kernel; the arguments are those of `edit_scalar.launch`, h and dy being needed for norms alone."""
    if slots is None and x.shape[0] > 1 and x.stride(0) == x.shape[1] * x.stride(1):  # one row of all tokens fills its tiles
        weight = weight if weight.numel() == 1 else weight.expand(x.shape[:2]).reshape(1, -1)
        x = x.flatten(0, 1)[None]
    (batch, tokens, width), m = x.shape, first.shape[1]
    gain, relative, gated, _ = options
    shape = shape_of(tokens, m, x.dtype)
    if m > EXACT:
        first, second = first.to(x.dtype), second.to(x.dtype)
    _edit.launch(
        (-(-tokens // shape["TILE"]), batch),
        x, out, q, first, second, weight, slots, *numbers, p, length,
        tokens, count, gain, x.stride(0), x.stride(1), *strides(weight), strides(slots)[0],
        *(bank.stride(0) if bank.shape[0] > 1 else 0 for bank in (first, second)),
        width, m, relative, gated, backward,
        **shape,
    )  # fmt: skip
