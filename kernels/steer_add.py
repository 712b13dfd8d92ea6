"""Steering add: a vector of a bank to each token, by row or token slot, and optionally the norm that the token had.

Mathematics, for a token h with weight w = strength x mask and the vector v of its slot:

    y = h + w v          o = y |h| / |y| with norm preservation, o = y without

    without:  dh = g                     dw = g.v                 dv = sum over the slot's tokens of w g
    with:     s = |h| / |y|, k = s (g.y) / |y|^2
              dy = s g - k y             dh = dy + (g.y) / (|h| |y|) h
              dw = dy.v                  dv = sum over the slot's tokens of w dy

A norm of 0 leaves the token as it is after the addition. Weight 0, and a slot that the bank does not have, leave it exactly as it was.

Shapes: h [batch, tokens, D] (fp32, bf16 or fp16; any row strides, any D; offsets in int64), bank [slots, D], weight [batch or 1, tokens
or 1] fp32, slots [batch, 1 or tokens] whole numbers. Sums and norms in fp32.

Bytes per token in bf16: forward 4 D (h read, o written; the bank comes from the caches). Backward without norm 0 (dh is g itself), with
norm 6 D. Vectors that learn add a pass over g, and with norm one write and read of dy.

Saved for backward: nothing of the size of h without norm, h alone with it: the norms are computed again while g and h are in registers.

Sources: Turner et al. 2023, arXiv 2308.10248 (add); the rescaling is part of many code bases. Deterministic.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose
from steer.kernels.jit import jit
from steer.kernels.layout import blank, inside, picked, power_of_two, readable, rows, slots_of, strides, sum_to, vectors, weights
from steer.kernels.weighted_sum import weighted_sum

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 8192  # columns that a program holds at once


@KERNELS.register("steer_add")
def steer_add(
    h: Tensor,
    bank: Tensor,
    strength: Tensor | float = 1.0,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """h + strength * mask * v: adds the vector of its slot to every token, and can keep its norm, in one pass over memory.

    Args:
        h: [..., width] activation; the first dimension is the batch.
        bank: [width] or [slots, width].
        strength, mask: what broadcasts to [..., 1]; 0 leaves a token exactly as it is.
        slots: [batch], or one for each token; -1 leaves it alone. None gives every token the first vector.
        preserve_norm: each token gets the norm that it had.

    Raises:
        WidthError, ConfigError: shapes that do not fit.
    """
    bank = vectors(bank, 2, h, "steering vectors")
    weight, slots = weights(h, strength, mask), slots_of(slots, h)
    way = reference if choose(h) != "triton" else SteerAdd.apply
    return way(rows(h), bank, weight, slots, preserve_norm).view(h.shape)


def reference(x: Tensor, bank: Tensor, weight: Tensor, slots: Tensor | None, norm: bool) -> Tensor:
    """The same in PyTorch operations, differentiable as often as one likes; Inductor makes one kernel of it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    full = x.to(wide)
    y = full + inside(weight, slots, bank.shape[0]).unsqueeze(-1) * picked(bank, slots).to(wide)
    return (y * kept_norm(full, y) if norm else y).to(x.dtype)


def kept_norm(before: Tensor, after: Tensor) -> Tensor:
    """The factor that gives `after` the norm of `before`, along the last dimension; exactly 1 where they are equal."""
    new = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(before, dim=-1, keepdim=True) / torch.where(new > 0, new, 1)


@jit
def _forward(
    h, out, bank, weight, slots, tokens, count, h_b, h_t, weight_b, weight_t, slots_b, slots_t,
    D: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token."""
    token = tl.program_id(0)
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    w = tl.load(weight + b * weight_b + t * weight_t).to(tl.float32)
    if slots is not None:
        slot = tl.load(slots + b * slots_b + t * slots_t).to(tl.int64)
        w = tl.where((slot >= 0) & (slot < count), w, 0.0)
        bank += slot * D
    h += b * h_b + t * h_t
    used = tl.where(w != 0, D, 0)  # columns of the vector that are read
    out += token.to(tl.int64) * D
    ratio = 1.0
    if NORM:  # loads that follow each other are merged by the compiler, so a row that fits is read once
        hh, yy = 0.0, 0.0
        for start in tl.static_range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            x = tl.load(h + d, mask=d < D, other=0.0).to(tl.float32)
            y = x + w * tl.load(bank + d, mask=d < used, other=0.0).to(tl.float32)
            hh += tl.sum(x * x, 0)
            yy += tl.sum(y * y, 0)
        ratio = tl.where(w != 0, tl.sqrt(hh) / tl.where(yy > 0, tl.sqrt(yy), 1.0), 1.0)  # what is left alone may be infinite
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(h + d, mask=d < D, other=0.0).to(tl.float32)
        y = x + w * tl.load(bank + d, mask=d < used, other=0.0).to(tl.float32)
        tl.store(out + d, (y * ratio).to(out.dtype.element_ty), mask=d < D)


@jit
def _backward(
    g, h, dh, dy, dw, bank, weight, slots, tokens, count,
    g_b, g_t, h_b, h_t, weight_b, weight_t, slots_b, slots_t,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the norm-preserving addition; one program for each token. dy [batch, tokens, D] and dw [batch, tokens] where they are wanted."""
    token = tl.program_id(0)
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    w = tl.load(weight + b * weight_b + t * weight_t).to(tl.float32)
    used = D
    if slots is not None:
        slot = tl.load(slots + b * slots_b + t * slots_t).to(tl.int64)
        used = tl.where((slot >= 0) & (slot < count), D, 0)
        w = tl.where(used > 0, w, 0.0)
        bank += slot * D
    g += b * g_b + t * g_t
    h += b * h_b + t * h_t
    dh += token.to(tl.int64) * D
    hh, yy, gy, gv, yv = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(h + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(bank + d, mask=d < used, other=0.0).to(tl.float32)
        gx = tl.load(g + d, mask=d < D, other=0.0).to(tl.float32)
        y = x + w * v
        hh += tl.sum(x * x, 0)
        yy += tl.sum(y * y, 0)
        gy += tl.sum(gx * y, 0)
        gv += tl.sum(gx * v, 0)
        yv += tl.sum(y * v, 0)
    hn = tl.where(hh > 0, tl.sqrt(hh), 1.0)
    yn = tl.where(yy > 0, tl.sqrt(yy), 1.0)
    s = tl.sqrt(hh) / yn
    k = s * gy / (yn * yn)
    r = gy / (hn * yn)
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(h + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(bank + d, mask=d < used, other=0.0).to(tl.float32)
        gx = tl.load(g + d, mask=d < D, other=0.0).to(tl.float32)
        change = s * gx - k * (x + w * v)
        tl.store(dh + d, tl.where(w != 0, change + r * x, gx).to(dh.dtype.element_ty), mask=d < D)
        if dy is not None:
            tl.store(dy + token.to(tl.int64) * D + d, change.to(dy.dtype.element_ty), mask=d < D)
    if dw is not None:  # last: a write between two reads of a row would make it be read twice
        tl.store(dw + token, s * gv - k * yv)


def shape_of(width: int) -> dict[str, int]:
    """Columns at once and warps: 8 bf16 numbers, one 128-bit load, for each thread, up to what registers hold."""
    block = min(power_of_two(width), BLOCK)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


class SteerAdd(torch.autograd.Function):
    """The Triton kernels for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, weight: Tensor, slots: Tensor | None, norm: bool) -> Tensor:
        ctx.norm, x, bank = norm, readable(x), bank.contiguous()
        out = blank(x)
        if x.numel():
            _forward.launch(
                (x.shape[0] * x.shape[1],),
                x, out, bank, weight, slots, x.shape[1], bank.shape[0],
                x.stride(0), x.stride(1), *strides(weight), *strides(slots),
                x.shape[2], norm,
                **shape_of(x.shape[2]),
            )  # fmt: skip
        ctx.save_for_backward(x if norm else None, bank, weight, slots)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, bank, weight, slots = ctx.saved_tensors
        _, learns, weighs = ctx.needs_input_grad[:3]
        g, d_weight, d_bank = readable(g), None, None
        dh, dy = g, g
        if not ctx.norm or not g.numel():
            dw = (g.float() * picked(bank, slots)).sum(-1) if weighs else None
        else:
            dh, dy = blank(g), blank(g) if learns else g
            dw = torch.empty(g.shape[:2], dtype=torch.float32, device=g.device) if weighs else None
            _backward.launch(
                (g.shape[0] * g.shape[1],),
                g, x, dh, dy if learns else None, dw, bank, weight, slots, g.shape[1], bank.shape[0],
                g.stride(0), g.stride(1), x.stride(0), x.stride(1), *strides(weight), *strides(slots),
                g.shape[2],
                **shape_of(g.shape[2]),
            )  # fmt: skip
        if dw is not None:
            d_weight = sum_to(inside(dw, slots, bank.shape[0]), weight)
        if learns:
            share = weight.float().expand(g.shape[:2]).unsqueeze(-1)
            d_bank = weighted_sum(dy, share, slots, bank.shape[0]).squeeze(1).to(bank.dtype)
        return dh, d_bank, d_weight, None, None
