"""The unified edit behind the opaque operators `steer::edit` and `steer::edit_backward`, for compiled code along many directions.

Operators take tensors and numbers only, and return tensors only: a tensor without numbers stands for one that is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.kernels.dispatch import can_run_triton
from steer.kernels.edit_autograd import (
    EditGradients,
    NeedsGrad,
    SavedForBackward,
    all_gradients,
    run_backward,
    run_forward,
    save_for_backward,
)
from steer.kernels.edit_reference import edit_reference, edit_reference_backward
from steer.kernels.edit_task import EditNumbers, EditOptions, EditTask, contiguous_directions

_ARGUMENTS = (
    "Tensor read, Tensor write, Tensor weight, Tensor? slots, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? low, Tensor? high, Tensor? threshold, "
    "float scale_minus_1, bool relative, bool gated, bool preserve_norm"
)
_FORWARD = f"(Tensor h, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor g, Tensor? h, Tensor p, Tensor h_norm, bool with_q, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"


def _task_of(read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, *numbers_and_options: Any) -> EditTask:
    """The arguments named in _ARGUMENTS, bundled."""
    n_numbers = len(EditNumbers._fields)
    numbers = EditNumbers(*numbers_and_options[:n_numbers])
    options = EditOptions(*numbers_and_options[n_numbers:])
    return EditTask(read, write, weight, slots, numbers, options)


@torch.library.custom_op("steer::edit", mutates_args=(), schema=_FORWARD)
def _edit(h: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(o, p, |h|)."""
    task = _task_of(*arguments)
    if can_run_triton(h):
        out, p, h_norm = run_forward(h, contiguous_directions(task), keep=True)
        assert p is not None
    else:
        out, p, h_norm = edit_reference(h, task)
        out = out.contiguous()
        p = p.contiguous()
        h_norm = None if h_norm is None else h_norm.squeeze(-1)
    return out, p, p.new_empty(0) if h_norm is None else h_norm


@_edit.register_fake
def _(h: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    task = _task_of(*arguments)
    wide = torch.promote_types(h.dtype, torch.float32)
    p = h.new_empty(*h.shape[:2], task.read.shape[1], dtype=wide)
    return h.new_empty(h.shape), p, h.new_empty(h.shape[:2] if task.options.relative else (0,), dtype=wide)


@torch.library.custom_op("steer::edit_backward", mutates_args=(), schema=_BACKWARD)
def _edit_backward(g: Tensor, h: Tensor | None, p: Tensor, h_norm: Tensor, with_q: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, q, dy); the latter two are empty unless more than dh is wanted, and dy also where it is g."""
    task = _task_of(*arguments)
    kept_norm = h_norm if task.options.relative else None
    q: Tensor | None
    if can_run_triton(g):
        dh, q, dy = run_backward(g, h, contiguous_directions(task), p, kept_norm, with_q)
    else:
        dh, q, dy = edit_reference_backward(g, h, task, p, None if kept_norm is None else kept_norm.unsqueeze(-1))
    no_dy = not (with_q and task.options.preserve_norm)
    return dh.contiguous(), q if with_q and q is not None else p.new_empty(0), g.new_empty(0) if no_dy else dy.to(g.dtype)


@_edit_backward.register_fake
def _(g: Tensor, h: Tensor | None, p: Tensor, h_norm: Tensor, with_q: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    has_dy = with_q and _task_of(*arguments).options.preserve_norm
    return g.new_empty(g.shape), p.new_empty(p.shape if with_q else (0,)), g.new_empty(g.shape if has_dy else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, read, write, *arguments = inputs
    _, p, h_norm = output
    save_for_backward(ctx, NeedsGrad.of(ctx), h, _task_of(read, write, *arguments), p, h_norm)


def _differentiate(ctx: Any, g: Tensor, *_: Any) -> EditGradients:
    saved, needs = SavedForBackward(*ctx.saved_tensors), NeedsGrad.of(ctx)
    task = saved.task(ctx.options)
    assert saved.p is not None
    dh, q, dy = torch.ops.steer.edit_backward(
        g, saved.h, saved.p, saved.h_norm, needs.any_but_h, task.read, task.write, task.weight, task.slots, *task.numbers, *task.options
    )
    if not needs.any_but_h:
        return EditGradients(dh)
    h_norm = saved.h_norm if task.options.relative else None
    return all_gradients(needs, dh, saved.h, task, saved.p, h_norm, q, dy if task.options.preserve_norm else g)


_edit.register_autograd(_differentiate, setup_context=_setup_context)
