"""The unified edit: along each of M directions, read a number from the activation, change it, and write the change back.

Mathematics, for a token h with weight w = strength x mask and the directions of its slot:

    p_j = h.U_j + b_j                                       read
    on_j = p_j > theta_j       (or theta_j |h|)             always on without a threshold
    z_j = p_j on_j                                          JumpReLU
    phi_j = min(max((s_j - 1) z_j + c_j, low_j - z_j), high_j - z_j)      = clamp(s_j z_j + c_j, low_j, high_j) - z_j
    phi_j = phi_j on_j         when gated
    y = h + w sum_j phi_j W_j                               write
    o = y |h| / |y|            with norm preservation

so that (s scale, c shift, everything else absent unless it is named)

    add c W                              s = 1, c            ablate span(U), U = W orthonormal     s = 0
    clamp to [low, high]                 low, high           scale a projection                    s
    set a JumpReLU feature to c          theta, s = 0, c     scale a JumpReLU feature              theta, s
    add c W where cos(h, U) > theta      theta, relative, gated, c (U of length 1)

Backward, with phi' = d phi / d p (s - 1 inside the bounds, -1 outside, 0 where off; the threshold has no derivative):

    dy = g, or s_n g - k y with norm preservation (s_n = |h| / |y|, k = s_n (g.y) / |y|^2)
    q_j = dy.W_j           dh = dy + w sum_j phi'_j q_j U_j   [+ (g.y) / (|h| |y|) h with norm preservation]
    dw = sum_j phi_j q_j, dW_j = sum over tokens of w phi_j dy, dU_j = sum of w phi'_j q_j h, and from w q_j those of b, s, c, low, high

Shapes: h [batch, tokens, D] (fp32, bf16 or fp16; any row strides, any D; offsets in int64), U and W [1 or slots, M, D], the numbers of
the directions [1 or slots, M] fp32, w [batch or 1, tokens or 1], slots [batch, 1 or tokens].

Bytes per token in bf16: forward and backward 4 D each (6 D backward with norm preservation), the directions coming from the caches. Saved
for backward: p, 4 M, and |h|, 4, where the threshold is relative; nothing of the size of h unless the norm is kept or U learns.

Two kernels: `edit_scalar` keeps one token in registers and goes through the directions one by one, M <= 16; `edit_tiles` takes 16 to 64
tokens and all directions at once through the tensor cores, M <= 256. What neither takes (more directions; more than 16 with norm
preservation, or with slots of tokens) runs in PyTorch operations. Deterministic.

Sources: Arditi et al. 2024, arXiv 2406.11717 (ablation); Lee et al. 2024, arXiv 2409.05907, CAST (gate); Rajamanoharan et al. 2024, arXiv
2407.14435 (JumpReLU); Templeton et al. 2024, "Scaling Monosemanticity" (clamping features; the change along decoder rows alone equals a
splice with the error term, since h + (decode(z') - decode(z)) = h + sum_j (z'_j - z_j) W_j).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.kernels import edit_scalar, edit_tiles
from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose, runs_triton
from steer.kernels.edit_formula import FUSED, Numbers, Options, changed, formula, formula_backward, slope, slots_in
from steer.kernels.layout import blank, inside, per_slot, picked, readable, rows, slots_of, sum_to, vectors, weights
from steer.kernels.weighted_sum import reference as summed
from steer.kernels.weighted_sum import weighted_sum

NAMES = ("bias", "scale", "shift", "low", "high", "threshold")


@KERNELS.register("edit")
def edit(
    h: Tensor,
    read: Tensor,
    write: Tensor | None = None,
    *,
    bias: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    shift: Tensor | float | None = None,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
    relative: bool = False,
    gated: bool = False,
    strength: Tensor | float = 1.0,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """h + strength * mask * sum_j phi_j(h.U_j) W_j: ablates, scales, clamps, sets or gates along directions in one pass over memory.

    Args:
        h: [..., width] activation; the first dimension is the batch.
        read: U, [M, width] or [slots, M, width].
        write: W, of the shape of `read`; None for the same vectors.
        bias, scale, shift, low, high, threshold: numbers of the directions, one for all, [M] or [slots, M]; see the top of this file.
        relative: the threshold is in units of |h|. gated: where a direction is not over its threshold, nothing is written along it.
        strength, mask: what broadcasts to [..., 1]; 0 leaves a token exactly as it is.
        slots: [batch], or one for each token; -1 leaves it alone. None gives every token the first slot.
        preserve_norm: each token gets the norm that it had.

    Raises:
        WidthError, ConfigError: shapes that do not fit.
    """
    read = vectors(read, 3, h, "directions to read")
    write = read if write is None else vectors(write, 3, h, "directions to write")
    if write.shape != read.shape:
        raise ConfigError(
            "directions to read and to write do not pair up",
            expected=f"two banks of the shape {list(read.shape)}",
            found=f"{list(write.shape)} to write",
            remedy="give one direction to write for each that is read",
        )
    gain = 0.0 if scale is None or isinstance(scale, Tensor) else float(scale) - 1
    given = (bias, scale if isinstance(scale, Tensor) else None, shift, low, high, threshold)
    numbers = tuple(None if one is None else _number(one, read, name) for name, one in zip(NAMES, given, strict=True))
    x, weight, slots = rows(h), weights(h, strength, mask), slots_of(slots, h)
    options = (gain, relative, gated, preserve_norm)
    way = choose(h, opaque=read.shape[1] > FUSED) if fits(read, slots, preserve_norm) else "aten"
    if way == "triton":
        out = Edit.apply(x, read, write, weight, slots, *numbers, *options)
    elif way == "op":
        out = torch.ops.steer.edit(x, read, write, weight, slots, *numbers, *options)[0]
    else:
        out = formula(x, read, write, weight, slots, numbers, options)[0]
    return out.view(h.shape)


def fits(read: Tensor, slots: Tensor | None, norm: bool) -> bool:
    """A kernel takes this many directions with these options."""
    (_, m, width), by_token = read.shape, slots is not None and slots.shape[1] > 1
    scalar = m <= edit_scalar.MOST and width <= edit_scalar.WIDEST
    return scalar or (m <= edit_tiles.MOST and not norm and not by_token)


def _number(value: Tensor | float, read: Tensor, what: str) -> Tensor:
    """[1 or slots, M]."""
    m = read.shape[1]
    if not isinstance(value, Tensor):
        return torch.full((1, m), float(value), dtype=torch.float32, device=read.device)
    value = value.view(1, -1) if value.dim() < 2 else value
    if value.dim() != 2 or value.shape[1] not in (1, m) or 0 in value.shape or value.device != read.device:
        raise ConfigError(
            f"'{what}' does not fit the directions",
            expected=f"a number, [{m}] or [slots, {m}], on {read.device}",
            found=f"{list(value.shape)} on {value.device}",
            remedy="give one number for all directions, or one for each",
        )
    return value.expand(-1, m)


# ---- autograd


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
    numbers: Numbers,
    options: Options,
    p: Tensor | None,
    length: Tensor | None,
    backward: bool,
) -> None:
    """Runs the kernel that suits, see `edit_scalar.launch`; it gets the numbers of the directions as [count, M] fp32."""
    count = slots_in(first, second, numbers)
    if x.numel():
        kernel = edit_scalar if edit_scalar.suits(x, first.shape[1], slots, options[3]) else edit_tiles
        numbers = tuple(None if one is None else one.expand(count, -1).float().contiguous() for one in numbers)
        kernel.launch(x, h, out, dy, q, first, second, weight, slots, numbers, options, p, length, count, backward=backward)


def run(
    x: Tensor, read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, numbers: Numbers, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, p, |h|) by a kernel; p [batch, tokens, M] and |h| [batch, tokens] only where they are kept, and |h| where it is needed."""
    x = readable(x)
    out, p, length = blank(x), None, None
    if keep:
        p = torch.empty(*x.shape[:2], read.shape[1], dtype=torch.float32, device=x.device)
        length = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) if options[1] else None
    launch(x, None, out, None, None, read, write, weight, slots, numbers, options, p, length, backward=False)
    return out, p, length


def run_backward(
    g: Tensor,
    x: Tensor | None,
    read: Tensor,
    write: Tensor,
    weight: Tensor,
    slots: Tensor | None,
    numbers: Numbers,
    options: Options,
    p: Tensor | None,
    length: Tensor | None,
    more: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dh, q, dy) by a kernel; q only when `more` than dh is wanted; dy is g itself when no norm is kept."""
    g, x = readable(g), None if x is None else readable(x)
    dh, dy = blank(g), blank(g) if options[3] and more else None
    q = torch.empty(*g.shape[:2], read.shape[1], dtype=torch.float32, device=g.device) if more else None
    launch(g, x, dh, dy, q, write, read, weight, slots, numbers, options, p, length, backward=True)
    return dh, q, g if dy is None else dy


def gradients(
    needs: Sequence[bool],
    x: Tensor | None,
    read: Tensor,
    write: Tensor,
    weight: Tensor,
    slots: Tensor | None,
    numbers: Numbers,
    options: Options,
    p: Tensor,
    length: Tensor | None,
    q: Tensor,
    dy: Tensor,
) -> list[Tensor | None]:
    """Those of read, write, weight, slots and the six numbers, where they are needed; from small tensors, but for the banks' own."""
    gain, _, gated, _ = options
    count = slots_in(read, write, numbers)
    chosen = tuple(None if one is None else picked(one, slots) for one in numbers)
    here = changed(p, chosen, gain, gated, None if length is None else length.unsqueeze(-1))
    w = inside(weight, slots, count).unsqueeze(-1)
    pull = w * q
    d_p = pull * slope(here)
    if here.on is not None and gated:
        pull = torch.where(here.on, pull, 0)
    off = torch.zeros_like(q, dtype=torch.bool)
    over = off if here.over is None else here.over
    under = off if here.under is None else here.under & ~over
    free = torch.where(over | under, 0, pull)

    def of_bank(bank: Tensor, vector: Tensor, share: Tensor) -> Tensor:
        own = None if bank.shape[0] == 1 else slots
        add = weighted_sum if choose(vector) == "triton" else summed
        return add(vector, share.expand(*vector.shape[:2], -1), own, bank.shape[0]).to(bank.dtype)

    def of_number(number: Tensor | None, share: Tensor) -> Tensor | None:
        own = None if number is None or number.shape[0] == 1 else slots
        return None if number is None else per_slot(share, own, number.shape[0]).to(number.dtype)

    made: list[Tensor | None] = [
        of_bank(read, x, d_p) if needs[0] and x is not None else None,
        of_bank(write, dy, w * here.phi) if needs[1] else None,
        sum_to(inside((here.phi * q).sum(-1), slots, count), weight) if needs[2] else None,
        None,
    ]
    shares = (d_p, free * here.z, free, torch.where(under, pull, 0), torch.where(over, pull, 0))
    of_numbers = [of_number(one, share) if need else None for one, share, need in zip(numbers, shares, needs[4:], strict=False)]
    return [*made, *of_numbers, None]


class Edit(torch.autograd.Function):
    """The Triton kernels for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, *rest: Any) -> Tensor:
        numbers, ctx.options = rest[:6], rest[6:]
        read, write = read.contiguous(), write.contiguous()
        more = any(ctx.needs_input_grad[1:])
        linear = all(one is None for one in numbers[3:])
        keep = more or (ctx.needs_input_grad[0] and (not linear or ctx.options[3]))
        out, p, length = run(x, read, write, weight, slots, numbers, ctx.options, keep)
        ctx.save_for_backward(x if ctx.options[3] or ctx.needs_input_grad[1] else None, read, write, weight, slots, *numbers, p, length)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, read, write, weight, slots, *numbers, p, length = ctx.saved_tensors
        given = (read, write, weight, slots, tuple(numbers), ctx.options, p, length)
        more = any(ctx.needs_input_grad[1:])
        dh, q, dy = run_backward(g, x, *given, more)
        rest = gradients(ctx.needs_input_grad[1:], x, *given, q, dy) if more and q is not None else [None] * 10
        return dh, *rest, None, None, None, None


# ---- the same behind an operator, for compiled code along many directions

_ARGUMENTS = (
    "Tensor read, Tensor write, Tensor weight, Tensor? slots, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? low, Tensor? high, Tensor? threshold, "
    "float gain, bool relative, bool gated, bool norm"
)


@torch.library.custom_op("steer::edit", mutates_args=(), schema=f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _edit(x: Tensor, read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    numbers, options = rest[:6], rest[6:]
    if runs_triton(x):
        out, p, length = run(x, read.contiguous(), write.contiguous(), weight, slots, numbers, options, True)
    else:
        out, p, length = formula(x, read, write, weight, slots, numbers, options)
        out, p, length = out.contiguous(), p.contiguous(), None if length is None else length.squeeze(-1)
    assert p is not None
    return out, p, p.new_empty(0) if length is None else length


@_edit.register_fake
def _(x: Tensor, read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    length = x.new_empty(x.shape[:2] if rest[7] else (0,), dtype=wide)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], read.shape[1], dtype=wide), length


_backward_schema = f"(Tensor g, Tensor? x, {_ARGUMENTS}, Tensor p, Tensor length, bool more) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("steer::edit_backward", mutates_args=(), schema=_backward_schema)
def _edit_backward(g: Tensor, x: Tensor | None, read: Tensor, write: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, q, dy); the latter two are empty unless more than dh is wanted, and dy also where it is g."""
    weight, slots, numbers, options, (p, length, more) = rest[0], rest[1], rest[2:8], rest[8:12], rest[12:]
    length = length if options[1] else None
    if runs_triton(g):
        dh, q, dy = run_backward(g, x, read.contiguous(), write.contiguous(), weight, slots, numbers, options, p, length, more)
    else:
        length = None if length is None else length.unsqueeze(-1)
        dh, q, dy = formula_backward(g, x, read, write, weight, slots, numbers, options, p, length)
    return dh.contiguous(), q if more and q is not None else p.new_empty(0), dy.to(g.dtype) if more and options[3] else g.new_empty(0)


@_edit_backward.register_fake
def _(g: Tensor, x: Tensor | None, read: Tensor, write: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    p, more, norm = rest[12], rest[14], rest[11]
    return g.new_empty(g.shape), p.new_empty(p.shape if more else (0,)), g.new_empty(g.shape if more and norm else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, read, write, weight, slots, *rest = inputs
    numbers, ctx.options = rest[:6], rest[6:]
    kept = x if ctx.options[3] or ctx.needs_input_grad[1] else None
    ctx.save_for_backward(kept, read, write, weight, slots, *numbers, output[1], output[2])


def _differentiate(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, read, write, weight, slots, *numbers, p, length = ctx.saved_tensors
    more = any(ctx.needs_input_grad[1:])
    dh, q, dy = torch.ops.steer.edit_backward(g, x, read, write, weight, slots, *numbers, *ctx.options, p, length, more)
    rest: list[Tensor | None] = [None] * 10
    if more:
        options = tuple(ctx.options)
        given = (read, write, weight, slots, tuple(numbers), options, p, length if options[1] else None)
        rest = gradients(ctx.needs_input_grad[1:], x, *given, q, dy if options[3] else g)
    return dh, *rest, None, None, None, None


_edit.register_autograd(_differentiate, setup_context=_keep)
