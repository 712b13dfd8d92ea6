"""Steering add: adds a vector of a bank to each token, by row or token slot, and can keep the norm that the token had.

Mathematics, for a token h with weight w = strength x mask and the vector v of its slot:

    y = h + w v          o = y |h| / |y| with norm preservation, o = y without

    without:  dh = g                     dw = g.v                 dv = sum over the slot's tokens of w g
    with:     s = |h| / |y|, k = s (g.y) / |y|^2
              dy = s g - k y             dh = dy + (g.y) / (|h| |y|) h
              dw = dy.v                  dv = sum over the slot's tokens of w dy

A token whose norm is 0 stays as it is after the addition. A token of weight 0, or of a slot that the bank does not have, stays exactly as
it was.

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

from typing import Any

import torch
from torch import Tensor

from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose_path
from steer.kernels.layout import (
    as_3d,
    bank_with_slots,
    broadcast_strides,
    contiguous_rows,
    empty_output,
    gather_slots,
    next_power_of_2,
    slots_as_2d,
    sum_to_broadcast,
    token_weights,
    zero_unknown_slots,
)
from steer.kernels.lazy_triton import tl, triton
from steer.kernels.weighted_sum import weighted_sum

MAX_BLOCK_SIZE = 8192  # columns that a program holds at once: 16 warps with 16 numbers a thread


@triton.jit
def _forward_kernel(
    h_ptr, out_ptr, bank_ptr, weight_ptr, slots_ptr,
    n_tokens, n_slots, h_stride_b, h_stride_t, weight_stride_b, weight_stride_t, slots_stride_b, slots_stride_t,
    WIDTH: tl.constexpr, PRESERVE_NORM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for each token."""
    row = tl.program_id(0)
    b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t).to(tl.float32)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t).to(tl.int64)
        w = tl.where((slot >= 0) & (slot < n_slots), w, 0.0)
        bank_ptr += slot * WIDTH
    h_ptr += b * h_stride_b + t * h_stride_t
    out_ptr += row.to(tl.int64) * WIDTH
    bank_width = tl.where(w != 0, WIDTH, 0)  # the vector of a token of weight 0 is not read: it may be anything, or nowhere
    ratio = 1.0
    if PRESERVE_NORM:  # the compiler merges this loop's loads with the next one's, so a row that fits is read once
        h_squared, y_squared = 0.0, 0.0
        for start in tl.static_range(0, WIDTH, BLOCK_SIZE):
            d = start + tl.arange(0, BLOCK_SIZE)
            h = tl.load(h_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
            y = h + w * tl.load(bank_ptr + d, mask=d < bank_width, other=0.0).to(tl.float32)
            h_squared += tl.sum(h * h, 0)
            y_squared += tl.sum(y * y, 0)
        ratio = tl.sqrt(h_squared) / tl.where(y_squared > 0, tl.sqrt(y_squared), 1.0)
        ratio = tl.where(w != 0, ratio, 1.0)  # exactly 1 also where the token is infinite
    for start in tl.static_range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        h = tl.load(h_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        y = h + w * tl.load(bank_ptr + d, mask=d < bank_width, other=0.0).to(tl.float32)
        tl.store(out_ptr + d, (y * ratio).to(out_ptr.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def _backward_kernel(
    g_ptr, h_ptr, dh_ptr, dy_ptr, dw_ptr, bank_ptr, weight_ptr, slots_ptr,
    n_tokens, n_slots, g_stride_b, g_stride_t, h_stride_b, h_stride_t,
    weight_stride_b, weight_stride_t, slots_stride_b, slots_stride_t,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of the norm-preserving addition, one program for each token; dy and dw where they are wanted."""
    row = tl.program_id(0)
    b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
    w = tl.load(weight_ptr + b * weight_stride_b + t * weight_stride_t).to(tl.float32)
    bank_width = WIDTH
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t).to(tl.int64)
        bank_width = tl.where((slot >= 0) & (slot < n_slots), WIDTH, 0)
        w = tl.where(bank_width > 0, w, 0.0)
        bank_ptr += slot * WIDTH
    g_ptr += b * g_stride_b + t * g_stride_t
    h_ptr += b * h_stride_b + t * h_stride_t
    dh_ptr += row.to(tl.int64) * WIDTH
    h_squared, y_squared, g_y, g_v, y_v = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in tl.static_range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        h = tl.load(h_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        v = tl.load(bank_ptr + d, mask=d < bank_width, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        y = h + w * v
        h_squared += tl.sum(h * h, 0)
        y_squared += tl.sum(y * y, 0)
        g_y += tl.sum(g * y, 0)
        g_v += tl.sum(g * v, 0)
        y_v += tl.sum(y * v, 0)
    h_norm = tl.where(h_squared > 0, tl.sqrt(h_squared), 1.0)
    y_norm = tl.where(y_squared > 0, tl.sqrt(y_squared), 1.0)
    s = tl.sqrt(h_squared) / y_norm
    k = s * g_y / (y_norm * y_norm)
    along_h = g_y / (h_norm * y_norm)
    for start in tl.static_range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        h = tl.load(h_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        v = tl.load(bank_ptr + d, mask=d < bank_width, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        dy = s * g - k * (h + w * v)
        tl.store(dh_ptr + d, tl.where(w != 0, dy + along_h * h, g).to(dh_ptr.dtype.element_ty), mask=d < WIDTH)
        if dy_ptr is not None:
            tl.store(dy_ptr + row.to(tl.int64) * WIDTH + d, dy.to(dy_ptr.dtype.element_ty), mask=d < WIDTH)
    if dw_ptr is not None:  # last: a write between two reads of a row would make the compiler read it twice
        tl.store(dw_ptr + row, s * g_v - k * y_v)


def _launch_parameters(width: int) -> dict[str, int]:
    """8 bf16 numbers, one 128-bit load, for each thread, and more threads up to 16 warps."""
    block_size = min(next_power_of_2(width), MAX_BLOCK_SIZE)
    return {"BLOCK_SIZE": block_size, "num_warps": min(max(block_size // 512, 1), 16)}


def _launch_forward(h: Tensor, out: Tensor, bank: Tensor, weight: Tensor, slots: Tensor | None, preserve_norm: bool) -> None:
    batch, tokens, width = h.shape
    weight_stride_b, weight_stride_t = broadcast_strides(weight)
    slots_stride_b, slots_stride_t = broadcast_strides(slots)
    _forward_kernel[(batch * tokens,)](
        h_ptr=h,
        out_ptr=out,
        bank_ptr=bank,
        weight_ptr=weight,
        slots_ptr=slots,
        n_tokens=tokens,
        n_slots=bank.shape[0],
        h_stride_b=h.stride(0),
        h_stride_t=h.stride(1),
        weight_stride_b=weight_stride_b,
        weight_stride_t=weight_stride_t,
        slots_stride_b=slots_stride_b,
        slots_stride_t=slots_stride_t,
        WIDTH=width,
        PRESERVE_NORM=preserve_norm,
        **_launch_parameters(width),
    )


def _launch_backward(
    g: Tensor, h: Tensor, dh: Tensor, dy: Tensor | None, dw: Tensor | None, bank: Tensor, weight: Tensor, slots: Tensor | None
) -> None:
    batch, tokens, width = g.shape
    weight_stride_b, weight_stride_t = broadcast_strides(weight)
    slots_stride_b, slots_stride_t = broadcast_strides(slots)
    _backward_kernel[(batch * tokens,)](
        g_ptr=g,
        h_ptr=h,
        dh_ptr=dh,
        dy_ptr=dy,
        dw_ptr=dw,
        bank_ptr=bank,
        weight_ptr=weight,
        slots_ptr=slots,
        n_tokens=tokens,
        n_slots=bank.shape[0],
        g_stride_b=g.stride(0),
        g_stride_t=g.stride(1),
        h_stride_b=h.stride(0),
        h_stride_t=h.stride(1),
        weight_stride_b=weight_stride_b,
        weight_stride_t=weight_stride_t,
        slots_stride_b=slots_stride_b,
        slots_stride_t=slots_stride_t,
        WIDTH=width,
        **_launch_parameters(width),
    )


class SteerAdd(torch.autograd.Function):
    """The Triton kernels for autograd."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bank: Tensor, weight: Tensor, slots: Tensor | None, preserve_norm: bool) -> Tensor:
        h = contiguous_rows(h)
        bank = bank.contiguous()
        out = empty_output(h)
        if h.numel():
            _launch_forward(h, out, bank, weight, slots, preserve_norm)
        ctx.preserve_norm = preserve_norm
        ctx.save_for_backward(h if preserve_norm else None, bank, weight, slots)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, bank, weight, slots = ctx.saved_tensors
        _, bank_needs_grad, weight_needs_grad, _, _ = ctx.needs_input_grad
        g = contiguous_rows(g)
        dh = dy = g  # without norm preservation, and for a batch without tokens
        dw = d_bank = d_weight = None
        if ctx.preserve_norm and g.numel():
            dh = empty_output(g)
            dy = empty_output(g) if bank_needs_grad else g
            dw = torch.empty(g.shape[:2], dtype=torch.float32, device=g.device) if weight_needs_grad else None
            _launch_backward(g, h, dh, dy if bank_needs_grad else None, dw, bank, weight, slots)
        elif weight_needs_grad:
            dw = (g.float() * gather_slots(bank, slots)).sum(-1)  # [batch, tokens]
        if dw is not None:
            d_weight = sum_to_broadcast(zero_unknown_slots(dw, slots, bank.shape[0]), weight)
        if bank_needs_grad:
            coefficients = weight.float().expand(g.shape[:2]).unsqueeze(-1)  # [batch, tokens, 1]
            d_bank = weighted_sum(dy, coefficients, slots, bank.shape[0]).squeeze(1).to(bank.dtype)  # [slots, width]
        return dh, d_bank, d_weight, None, None


def norm_ratio(before: Tensor, after: Tensor) -> Tensor:
    """The factor that gives `after` the norm of `before`, along the last dimension; exactly 1 where they are equal."""
    after_norm = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(before, dim=-1, keepdim=True) / torch.where(after_norm > 0, after_norm, 1)


def steer_add_reference(h: Tensor, bank: Tensor, weight: Tensor, slots: Tensor | None, preserve_norm: bool) -> Tensor:
    """The same in PyTorch operations, differentiable as often as one likes; Inductor makes one kernel of it."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    y = x + zero_unknown_slots(weight, slots, bank.shape[0]).unsqueeze(-1) * gather_slots(bank, slots).to(x.dtype)
    return (y * norm_ratio(x, y) if preserve_norm else y).to(h.dtype)


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

    Gives [..., width] in the dtype of h.

    Args:
        h: [..., width] activation; the first dimension is the batch.
        bank: [width] or [slots, width].
        strength, mask: what broadcasts to [..., 1]; 0 leaves a token exactly as it is.
        slots: [batch], or one for each token; -1 leaves it alone. None gives every token the first vector.
        preserve_norm: each token keeps the norm that it had.

    Raises:
        WidthError, ConfigError: shapes that do not fit.

    Example:
        >>> steered = steer_add(torch.randn(2, 7, 32), torch.randn(3, 32), strength=4.0, slots=torch.tensor([2, -1]))
    """
    bank = bank_with_slots(bank, 2, h, "steering vectors")
    weight = token_weights(h, strength, mask)
    slots = slots_as_2d(slots, h)
    add = SteerAdd.apply if choose_path(h) == "triton" else steer_add_reference
    return add(as_3d(h), bank, weight, slots, preserve_norm).view(h.shape)
