"""The unified edit with one token in registers, along few directions; mathematics in `edit.py`.

A program reads its token once, takes the inner product with one direction after the other in fp32, and writes once. The directions come
from the L1 cache while they fit (2 M D x 4 bytes: 4 directions of 4,096 numbers are 131 kB), from the L2 cache above, where each token
costs 8 M D bytes of its bandwidth: the reason why many tokens along more directions go to `edit_tiles`.

The backward pass is the same loop with the directions' roles exchanged; with norm preservation it builds y again from p first.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from steer.kernels.jit import inline, jit
from steer.kernels.layout import power_of_two, strides

if TYPE_CHECKING:
    import triton.language as tl

MOST = 16  # directions
WIDEST = 16384  # columns, all of them in registers
CACHED = 4  # directions up to which the L1 cache holds them
MANY = 1024  # tokens that are worth tiles


def suits(x: Tensor, m: int, slots: Tensor | None, norm: bool) -> bool:
    """This kernel takes the edit, and is the better one for it."""
    if m > MOST or x.shape[-1] > WIDEST:
        return False
    by_token = slots is not None and slots.shape[1] > 1
    return norm or by_token or m <= CACHED or x.shape[0] * x.shape[1] < MANY


@inline
def change(p, at, mask, reach, scale, shift, low, high, threshold, gain, GATED: tl.constexpr):
    """(phi, d phi / d p) of the numbers p; those of their directions are at `at`."""
    slope = tl.where(p == p, gain, gain)
    if scale is not None:
        slope += tl.load(scale + at, mask=mask) - 1.0
    on = p == p
    if threshold is not None:
        on = p > tl.load(threshold + at, mask=mask) * reach
    z = tl.where(on, p, 0.0)
    phi = slope * z
    if shift is not None:
        phi += tl.load(shift + at, mask=mask)
    if low is not None:
        bound = tl.load(low + at, mask=mask) - z
        slope = tl.where(phi < bound, -1.0, slope)
        phi = tl.where(phi < bound, bound, phi)
    if high is not None:
        bound = tl.load(high + at, mask=mask) - z
        slope = tl.where(phi > bound, -1.0, slope)
        phi = tl.where(phi > bound, bound, phi)
    if GATED:
        phi = tl.where(on, phi, 0.0)
    return phi, tl.where(on, slope, 0.0)


@jit
def _edit(
    x, h, out, dy, q, first, second, weight, slots, bias, scale, shift, low, high, threshold, p, length,
    tokens, count, gain, x_b, x_t, h_b, h_t, weight_b, weight_t, slots_b, slots_t, first_s, second_s,
    D: tl.constexpr, M: tl.constexpr, RELATIVE: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token. Forward: x is h, first U, second W. Backward: x is g, first W, second U; h only to keep the norm."""
    token = tl.program_id(0)
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    token = token.to(tl.int64)
    w = tl.load(weight + b * weight_b + t * weight_t).to(tl.float32)
    at = token * 0
    if slots is not None:
        slot = tl.load(slots + b * slots_b + t * slots_t).to(tl.int64)
        there = (slot >= 0) & (slot < count)
        w = tl.where(there, w, 0.0)
        slot = tl.where(there, slot, 0)
        at = slot * M
        first += slot * first_s
        second += slot * second_s
    d = tl.arange(0, BLOCK)
    row = d < D
    given = tl.load(x + b * x_b + t * x_t + d, mask=row, other=0.0).to(tl.float32)
    reach = 1.0
    if BACKWARD:
        if RELATIVE:
            reach = tl.load(length + token)
        inner, base = given, given
        if NORM:
            full = tl.load(h + b * h_b + t * h_t + d, mask=row, other=0.0).to(tl.float32)
            y = full
            for j in range(M):
                phi, _ = change(tl.load(p + token * M + j), at + j, None, reach, scale, shift, low, high, threshold, gain, GATED)
                y += (w * phi) * tl.load(first + j * D + d, mask=row, other=0.0).to(tl.float32)
            hn, yn, gy = tl.sqrt(tl.sum(full * full, 0)), tl.sqrt(tl.sum(y * y, 0)), tl.sum(given * y, 0)
            safe = tl.where(yn > 0, yn, 1.0)
            inner = (given - gy / (safe * safe) * y) * (hn / safe)
            base = inner + gy / (tl.where(hn > 0, hn, 1.0) * safe) * full
            if dy is not None:
                tl.store(dy + token * D + d, inner.to(dy.dtype.element_ty), mask=row)
        made = base
        for j in range(M):
            pull = tl.sum(inner * tl.load(first + j * D + d, mask=row, other=0.0).to(tl.float32), 0)
            if q is not None:
                tl.store(q + token * M + j, pull)
            read = pull
            if p is not None:
                read = tl.load(p + token * M + j)
            _, slope = change(read, at + j, None, reach, scale, shift, low, high, threshold, gain, GATED)
            made += (w * slope * pull) * tl.load(second + j * D + d, mask=row, other=0.0).to(tl.float32)
    else:
        hh = tl.sum(given * given, 0)
        if RELATIVE:
            reach = tl.sqrt(hh)
            if length is not None:
                tl.store(length + token, reach)
        made = given
        for j in range(M):
            read = tl.sum(given * tl.load(first + j * D + d, mask=row, other=0.0).to(tl.float32), 0)
            if bias is not None:
                read += tl.load(bias + at + j)
            if p is not None:
                tl.store(p + token * M + j, read)
            phi, _ = change(read, at + j, None, reach, scale, shift, low, high, threshold, gain, GATED)
            made += (w * phi) * tl.load(second + j * D + d, mask=row, other=0.0).to(tl.float32)
        if NORM:
            yy = tl.sum(made * made, 0)
            made = made * (tl.sqrt(hh) / tl.where(yy > 0, tl.sqrt(yy), 1.0))
    tl.store(out + token * D + d, tl.where(w != 0, made, given).to(out.dtype.element_ty), mask=row)


def launch(
    x: Tensor,
    h: Tensor | None,
    out: Tensor,
    dy: Tensor | None,
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
    """Runs the kernel; numbers [count, M], first and second [1 or count, M, D], everything contiguous but x, h, weight and slots."""
    (batch, tokens, width), m = x.shape, first.shape[1]
    gain, relative, gated, norm = options
    block = power_of_two(width)
    _edit.launch(
        (batch * tokens,),
        x, h, out, dy, q, first, second, weight, slots, *numbers, p, length,
        tokens, count, gain, x.stride(0), x.stride(1), *strides(h), *strides(weight), *strides(slots),
        *(bank.stride(0) if bank.shape[0] > 1 else 0 for bank in (first, second)),
        width, m, relative, gated, norm, backward, block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
