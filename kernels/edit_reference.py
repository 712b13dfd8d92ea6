"""The unified edit in PyTorch operations, forward and backward; mathematics in `edit.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.kernels.edit_task import EditNumbers, EditOptions, EditTask, count_slots
from steer.kernels.layout import gather_slots, zero_unknown_slots
from steer.kernels.steer_add import norm_ratio

MAX_FUSED = 8  # directions up to which Inductor keeps one pass over memory when products are written as sums


class PhiTerms(NamedTuple):
    """phi of the projections, and the terms of its derivatives; all [batch, tokens, M]."""

    phi: Tensor
    is_on: Tensor | None  # over the threshold; None without one
    z: Tensor
    is_raised: Tensor | None  # to the lower bound
    is_lowered: Tensor | None  # to the upper bound
    scale_minus_1: Tensor | float


def evaluate_phi(p: Tensor, numbers: EditNumbers, options: EditOptions, h_norm: Tensor | None) -> PhiTerms:
    """phi of the projections p [batch, tokens, M].

    Args:
        numbers: what broadcasts to p.
        h_norm: |h|, [batch, tokens, 1], for a relative threshold.
    """
    is_on = is_raised = is_lowered = None
    z = p
    if numbers.threshold is not None:
        is_on = p > (numbers.threshold if h_norm is None else numbers.threshold * h_norm)
        z = torch.where(is_on, p, 0)
    scale_minus_1 = options.scale_minus_1 if numbers.scale is None else numbers.scale - 1
    phi = scale_minus_1 * z
    phi = phi if numbers.shift is None else phi + numbers.shift
    if numbers.low is not None:
        is_raised = phi < numbers.low - z
        phi = torch.where(is_raised, numbers.low - z, phi)
    if numbers.high is not None:
        is_lowered = phi > numbers.high - z
        phi = torch.where(is_lowered, numbers.high - z, phi)
    if is_on is not None and options.gated:
        phi = torch.where(is_on, phi, 0)
    return PhiTerms(phi, is_on, z, is_raised, is_lowered, scale_minus_1)


def phi_slope(terms: PhiTerms) -> Tensor:
    """d phi / d p."""
    slope = torch.zeros_like(terms.z) + terms.scale_minus_1
    for is_bound in (terms.is_raised, terms.is_lowered):
        slope = slope if is_bound is None else torch.where(is_bound, -1, slope)
    return slope if terms.is_on is None else torch.where(terms.is_on, slope, 0)


def edit_reference(h: Tensor, task: EditTask) -> tuple[Tensor, Tensor, Tensor | None]:
    """The edit in PyTorch operations, differentiable as often as one likes; Inductor makes one kernel of it up to `MAX_FUSED` directions.

    Returns:
        (o, p, |h|): |h| [batch, tokens, 1] where a threshold is relative to it; p in compiled code that of the last direction alone.
    """
    options = task.options
    wide = torch.promote_types(h.dtype, torch.float32)
    x = h.to(wide)
    u = gather_slots(task.read, task.slots).to(wide)  # [batch or 1, tokens or 1, M, width]
    v = gather_slots(task.write, task.slots).to(wide)
    numbers = _gather_numbers(task, wide)
    h_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if options.relative else None
    weight = zero_unknown_slots(task.weight, task.slots, count_slots(task)).unsqueeze(-1)  # [batch or 1, tokens or 1, 1]
    n_directions = task.read.shape[1]
    if torch.compiler.is_compiling() and n_directions <= MAX_FUSED:
        # Inductor ends a kernel at a matrix product; sums of products, one direction at a time, stay in one kernel
        p = y = x
        for j in range(n_directions):
            own = EditNumbers(*[None if number is None else number[..., j : j + 1] for number in numbers])
            p = (x * u[:, :, j]).sum(-1, keepdim=True)  # [batch, tokens, 1]
            p = p if own.bias is None else p + own.bias
            y = y + weight * evaluate_phi(p, own, options, h_norm).phi * v[:, :, j]
    else:
        p = _project(x, u)
        p = p if numbers.bias is None else p + numbers.bias
        y = x + _combine(weight * evaluate_phi(p, numbers, options, h_norm).phi, v)
    return (y * norm_ratio(x, y) if options.preserve_norm else y).to(h.dtype), p, h_norm


def edit_reference_backward(g: Tensor, h: Tensor | None, task: EditTask, p: Tensor, h_norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, q, dy) from what the forward pass has read; h where the norm is kept."""
    wide = torch.promote_types(g.dtype, torch.float32)
    u = gather_slots(task.read, task.slots).to(wide)
    v = gather_slots(task.write, task.slots).to(wide)
    terms = evaluate_phi(p, _gather_numbers(task, wide), task.options, h_norm)
    weight = zero_unknown_slots(task.weight, task.slots, count_slots(task)).unsqueeze(-1)
    dy = dh = g.to(wide)
    if task.options.preserve_norm and h is not None:
        x = h.to(wide)
        y = x + _combine(weight * terms.phi, v)
        x_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y_norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        divisor = torch.where(y_norm > 0, y_norm, 1)
        g_y = (dy * y).sum(-1, keepdim=True)
        dy = (dy - g_y / divisor.square() * y) * (x_norm / divisor)
        dh = dy + g_y / (torch.where(x_norm > 0, x_norm, 1) * divisor) * x
    q = _project(dy, v)
    return (dh + _combine(weight * phi_slope(terms) * q, u)).to(g.dtype), q, dy


def _gather_numbers(task: EditTask, dtype: torch.dtype) -> EditNumbers:
    """The numbers of each row or token, [batch or 1, tokens or 1, M]."""
    return EditNumbers(*[None if number is None else gather_slots(number, task.slots).to(dtype) for number in task.numbers])


def _project(x: Tensor, u: Tensor) -> Tensor:
    """x [batch, tokens, width] on u [batch or 1, tokens or 1, M, width]: [batch, tokens, M]."""
    with torch.autocast(x.device.type, enabled=False):  # which would round it to bf16
        return x @ u[:, 0].mT if u.shape[1] == 1 else (u @ x.unsqueeze(-1)).squeeze(-1)


def _combine(coefficients: Tensor, v: Tensor) -> Tensor:
    """Vectors v [batch or 1, tokens or 1, M, width] times coefficients [batch, tokens, M], summed: [batch, tokens, width]."""
    with torch.autocast(coefficients.device.type, enabled=False):
        return coefficients @ v[:, 0] if v.shape[1] == 1 else (coefficients.unsqueeze(-2) @ v).squeeze(-2)
