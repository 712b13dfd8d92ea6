"""The unified edit for autograd: which kernel runs, what is kept for the backward pass, and all gradients; mathematics in `edit.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.kernels import edit_scalar, edit_tiles
from steer.kernels.dispatch import choose_path
from steer.kernels.edit_reference import evaluate_phi, phi_slope
from steer.kernels.edit_task import EditNumbers, EditOptions, EditTask, count_slots
from steer.kernels.layout import (
    contiguous_rows,
    empty_output,
    gather_slots,
    is_per_token,
    sum_per_slot,
    sum_to_broadcast,
    zero_unknown_slots,
)
from steer.kernels.weighted_sum import weighted_sum, weighted_sum_reference


def has_kernel(read: Tensor, slots: Tensor | None, preserve_norm: bool) -> bool:
    """A kernel takes directions [slots, M, width] with these options."""
    _, m, width = read.shape
    if m <= edit_scalar.MAX_DIRECTIONS and width <= edit_scalar.MAX_WIDTH:
        return True
    return m <= edit_tiles.MAX_DIRECTIONS and not preserve_norm and not is_per_token(slots)


class ForwardResult(NamedTuple):
    """What the forward kernels write."""

    out: Tensor
    p: Tensor | None  # [batch, tokens, M], where it is kept
    h_norm: Tensor | None  # [batch, tokens], where it is kept and a threshold is relative to it


def run_forward(h: Tensor, task: EditTask, keep: bool) -> ForwardResult:
    """The edit by the kernel that suits. keep: p and |h| for the backward pass."""
    h = contiguous_rows(h)
    out = empty_output(h)
    p = h_norm = None
    if keep:
        p = torch.empty(*h.shape[:2], task.read.shape[1], dtype=torch.float32, device=h.device)
        h_norm = torch.empty(h.shape[:2], dtype=torch.float32, device=h.device) if task.options.relative else None
    if h.numel():
        kernel = edit_scalar if edit_scalar.is_suitable(h, task) else edit_tiles
        kernel.launch_forward(h, task, out, p, h_norm)
    else:
        count_slots(task)  # raises for banks that differ, as a launch does
    return ForwardResult(out, p, h_norm)


class BackwardResult(NamedTuple):
    """What the backward kernels write."""

    dh: Tensor
    q: Tensor | None  # [batch, tokens, M], where more than dh is wanted
    dy: Tensor  # g itself where no norm is kept, or nothing but dh is wanted


def run_backward(g: Tensor, h: Tensor | None, task: EditTask, p: Tensor | None, h_norm: Tensor | None, with_q: bool) -> BackwardResult:
    """The backward pass by the kernel that suits. with_q: also q and dy, which the gradients of other tensors than h are made of."""
    g = contiguous_rows(g)
    h = None if h is None else contiguous_rows(h)
    dh = empty_output(g)
    dy = empty_output(g) if with_q and task.options.preserve_norm else None
    q = torch.empty(*g.shape[:2], task.read.shape[1], dtype=torch.float32, device=g.device) if with_q else None
    if g.numel():
        if edit_scalar.is_suitable(g, task):
            edit_scalar.launch_backward(g, h, task, p, h_norm, dh, q, dy)
        else:
            edit_tiles.launch_backward(g, task, p, h_norm, dh, q)
    return BackwardResult(dh, q, g if dy is None else dy)


class NeedsGrad(NamedTuple):
    """Which arguments of the edit need a gradient, in their order."""

    h: bool
    read: bool
    write: bool
    weight: bool
    slots: bool
    bias: bool
    scale: bool
    shift: bool
    low: bool
    high: bool
    threshold: bool
    scale_minus_1: bool
    relative: bool
    gated: bool
    preserve_norm: bool

    @classmethod
    def of(cls, ctx: Any) -> NeedsGrad:
        """From the context of autograd, which for an operator has an entry more."""
        return cls(*ctx.needs_input_grad[: len(cls._fields)])

    @property
    def any_but_h(self) -> bool:
        """Something besides the activation."""
        return any(self[1:])


class EditGradients(NamedTuple):
    """Gradients of the arguments of the edit, in their order; None where they are not needed or do not exist."""

    h: Tensor
    read: Tensor | None = None
    write: Tensor | None = None
    weight: Tensor | None = None
    slots: None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    threshold: None = None
    scale_minus_1: None = None
    relative: None = None
    gated: None = None
    preserve_norm: None = None


def all_gradients(
    needs: NeedsGrad, dh: Tensor, h: Tensor | None, task: EditTask, p: Tensor, h_norm: Tensor | None, q: Tensor, dy: Tensor
) -> EditGradients:
    """All gradients that are needed, from small tensors but for those of the directions. h [batch, tokens, width] if read needs one."""
    numbers = EditNumbers(*[None if number is None else gather_slots(number, task.slots) for number in task.numbers])
    terms = evaluate_phi(p, numbers, task.options, None if h_norm is None else h_norm.unsqueeze(-1))
    n_slots = count_slots(task)
    weight = zero_unknown_slots(task.weight, task.slots, n_slots).unsqueeze(-1)  # [batch or 1, tokens or 1, 1]
    d_phi = weight * q  # [batch, tokens, M]
    d_p = d_phi * phi_slope(terms)
    if terms.is_on is not None and task.options.gated:
        d_phi = torch.where(terms.is_on, d_phi, 0)
    nowhere = torch.zeros_like(q, dtype=torch.bool)
    is_lowered = nowhere if terms.is_lowered is None else terms.is_lowered  # the upper bound wins
    is_raised = nowhere if terms.is_raised is None else terms.is_raised & ~is_lowered
    d_unbound = torch.where(is_lowered | is_raised, 0, d_phi)

    def sum_to_bank(bank: Tensor, vectors: Tensor, coefficients: Tensor) -> Tensor:
        slots = None if bank.shape[0] == 1 else task.slots
        sum_vectors = weighted_sum if choose_path(vectors) == "triton" else weighted_sum_reference
        return sum_vectors(vectors, coefficients.expand(*vectors.shape[:2], -1), slots, bank.shape[0]).to(bank.dtype)

    def sum_to_number(number: Tensor | None, shares: Tensor) -> Tensor | None:
        if number is None:
            return None
        slots = None if number.shape[0] == 1 else task.slots
        return sum_per_slot(shares, slots, number.shape[0]).to(number.dtype)

    d_weight = None
    if needs.weight:
        d_weight = sum_to_broadcast(zero_unknown_slots((terms.phi * q).sum(-1), task.slots, n_slots), task.weight)
    return EditGradients(
        h=dh,
        read=sum_to_bank(task.read, h, d_p) if needs.read and h is not None else None,
        write=sum_to_bank(task.write, dy, weight * terms.phi) if needs.write else None,
        weight=d_weight,
        bias=sum_to_number(task.numbers.bias, d_p) if needs.bias else None,
        scale=sum_to_number(task.numbers.scale, d_unbound * terms.z) if needs.scale else None,
        shift=sum_to_number(task.numbers.shift, d_unbound) if needs.shift else None,
        low=sum_to_number(task.numbers.low, torch.where(is_raised, d_phi, 0)) if needs.low else None,
        high=sum_to_number(task.numbers.high, torch.where(is_lowered, d_phi, 0)) if needs.high else None,
    )


class SavedForBackward(NamedTuple):
    """What is saved for the backward pass."""

    h: Tensor | None  # where the norm is kept, or the directions to read need a gradient
    read: Tensor
    write: Tensor
    weight: Tensor
    slots: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    low: Tensor | None
    high: Tensor | None
    threshold: Tensor | None
    p: Tensor | None
    h_norm: Tensor | None

    def task(self, options: EditOptions) -> EditTask:
        """The arguments of the forward pass."""
        numbers = EditNumbers(self.bias, self.scale, self.shift, self.low, self.high, self.threshold)
        return EditTask(self.read, self.write, self.weight, self.slots, numbers, options)


def save_for_backward(ctx: Any, needs: NeedsGrad, h: Tensor, task: EditTask, p: Tensor | None, h_norm: Tensor | None) -> None:
    """Keeps what `SavedForBackward` lists."""
    ctx.options = task.options
    kept_h = h if task.options.preserve_norm or needs.read else None
    ctx.save_for_backward(*SavedForBackward(kept_h, task.read, task.write, task.weight, task.slots, *task.numbers, p, h_norm))


class Edit(torch.autograd.Function):
    """The Triton kernels for autograd, which sees tensors only among plain arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        read: Tensor,
        write: Tensor,
        weight: Tensor,
        slots: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        threshold: Tensor | None,
        scale_minus_1: float,
        relative: bool,
        gated: bool,
        preserve_norm: bool,
    ) -> Tensor:
        numbers = EditNumbers(bias, scale, shift, low, high, threshold)
        options = EditOptions(scale_minus_1, relative, gated, preserve_norm)
        task = EditTask(read.contiguous(), write.contiguous(), weight, slots, numbers, options)
        needs = NeedsGrad.of(ctx)
        is_linear = low is None and high is None and threshold is None  # then phi' does not depend on p
        keep = needs.any_but_h or (needs.h and (not is_linear or preserve_norm))
        out, p, h_norm = run_forward(h, task, keep)
        save_for_backward(ctx, needs, h, task, p, h_norm)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> EditGradients:
        saved, needs = SavedForBackward(*ctx.saved_tensors), NeedsGrad.of(ctx)
        task = saved.task(ctx.options)
        dh, q, dy = run_backward(g, saved.h, task, saved.p, saved.h_norm, needs.any_but_h)
        if q is None or saved.p is None:
            return EditGradients(dh)
        return all_gradients(needs, dh, saved.h, task, saved.p, saved.h_norm, q, dy)
