"""The arguments of a unified edit, bundled: directions, their numbers, weights, slots and options; mathematics in `edit.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from steer.errors import ConfigError
from steer.kernels.layout import broadcast_strides, slot_stride


class EditNumbers(NamedTuple):
    """One number for each direction, [1 or slots, M]; None where it changes nothing."""

    bias: Tensor | None = None  # b
    scale: Tensor | None = None  # s, where it is not one number for all (then see EditOptions)
    shift: Tensor | None = None  # c
    low: Tensor | None = None
    high: Tensor | None = None
    threshold: Tensor | None = None  # theta


class EditOptions(NamedTuple):
    """What is the same for all directions, and known when a kernel is compiled but for the scale."""

    scale_minus_1: float = 0.0  # s - 1, where EditNumbers has no scale
    relative: bool = False  # thresholds are in units of |h|
    gated: bool = False  # nothing is written along a direction that is not over its threshold
    preserve_norm: bool = False


class EditTask(NamedTuple):
    """Everything about an edit but the activation."""

    read: Tensor  # U, [1 or slots, M, width]
    write: Tensor  # W, [1 or slots, M, width]
    weight: Tensor  # strength x mask, [batch or 1, tokens or 1]
    slots: Tensor | None  # [batch, 1 or tokens]
    numbers: EditNumbers
    options: EditOptions


def count_slots(task: EditTask) -> int:
    """Number of slots: that of every bank which has more than one. Raises ConfigError when they differ."""
    counts = {bank.shape[0] for bank in (task.read, task.write, *task.numbers) if bank is not None} - {1}
    if len(counts) > 1:
        raise _slot_counts_error(counts)
    return counts.pop() if counts else 1


def contiguous_directions(task: EditTask) -> EditTask:
    """The task with directions as kernels read them."""
    return task._replace(read=task.read.contiguous(), write=task.write.contiguous())


def contiguous_number(number: Tensor, n_slots: int) -> Tensor:
    """A number of the directions as kernels read it: [n_slots, M] fp32, contiguous."""
    return number.expand(n_slots, -1).float().contiguous()


def kernel_arguments(task: EditTask) -> dict[str, Any]:
    """The arguments that all kernels of an edit take, by name. The bias is not among them: a backward pass does not need it."""
    n_slots = count_slots(task)
    weight_stride_b, weight_stride_t = broadcast_strides(task.weight)
    scale, shift, low, high, threshold = [
        None if number is None else contiguous_number(number, n_slots)
        for number in task.numbers[1:]  # without the bias
    ]
    return {
        "read_ptr": task.read,
        "write_ptr": task.write,
        "weight_ptr": task.weight,
        "slots_ptr": task.slots,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "low_ptr": low,
        "high_ptr": high,
        "threshold_ptr": threshold,
        "n_slots": n_slots,
        "scale_minus_1": task.options.scale_minus_1,
        "weight_stride_b": weight_stride_b,
        "weight_stride_t": weight_stride_t,
        "slots_stride_b": broadcast_strides(task.slots)[0],
        "read_stride_s": slot_stride(task.read),
        "write_stride_s": slot_stride(task.write),
        "M": task.read.shape[1],
        "RELATIVE": task.options.relative,
        "GATED": task.options.gated,
    }


# ---- errors


def _slot_counts_error(counts: set[int]) -> ConfigError:
    return ConfigError(
        "the banks of an edit differ in slots",
        expected="one number of slots, or 1",
        found=", ".join(map(str, sorted(counts))),
        remedy="give every bank as many slots as the others, or one for all rows",
    )
