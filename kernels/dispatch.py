"""Which path a call takes: PyTorch operations, a Triton kernel, or a Triton kernel behind an opaque operator.

`auto`, the default, decides by where the call happens:

- compiled code gets PyTorch operations, which Inductor fuses into the kernels beside them; only where Inductor cannot keep one pass over
  memory (edits along many directions, drift statistics) it gets an operator that holds the Triton kernel;
- eager code on a GPU gets the Triton kernel behind an `autograd.Function`;
- everything else gets PyTorch operations: other devices, fp64, tensor subclasses, function transforms, an active dispatch mode, and any
  machine on which Triton cannot be imported.

`force`, or the environment variable STEER_KERNELS, says `aten`, `triton` or `op` for all calls instead. `aten` is the way out where
Triton is broken, and the way to second derivatives, which the kernels do not have.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steer.errors import ConfigError

PATHS = {
    "auto": "by device, dtype and compilation",
    "aten": "PyTorch operations everywhere",
    "triton": "the Triton kernel; in compiled code behind an operator",
    "op": "an opaque operator, with the Triton kernel inside where it can run",
}
VARIABLE = "STEER_KERNELS"
MIN_NUMEL = 1 << 20  # an estimate: a pass over as many numbers takes half a microsecond, starting a kernel from Python tens of them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_path(name: str) -> str:
    """The name of a path. Raises ConfigError for any other."""
    if name not in PATHS:
        raise _unknown_path_error(name)
    return name


@contextmanager
def force(name: str) -> Iterator[None]:
    """Makes all calls inside take one path: `with force("aten"): ...`. Raises ConfigError for an unknown name.

    Example:
        >>> with steer.kernels.force("aten"):
        ...     steered = steer.kernels.steer_add(torch.randn(2, 7, 32), torch.randn(1, 32))
    """
    global _forced
    before, _forced = _forced, _check_path(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The path that `force` or the environment asks for."""
    return _forced


def can_run_triton(h: Tensor) -> bool:
    """A Triton kernel can be launched on this tensor."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on any device
    return _has_triton and (h.is_cuda or interpreting) and h.dtype in DTYPES


def runs_kernel(*tensors: Tensor) -> bool:
    """All can be read by a kernel, where the path is taken already: inside operators, autograd functions and backward passes."""
    return _forced != "aten" and all(can_run_triton(tensor) and (tensor.is_cuda or _forced != "auto") for tensor in tensors)


def wanted(h: Tensor) -> bool:
    """Whether an operator should call the functions of this package for an activation, rather than do its own few PyTorch operations.

    Yes in compiled code, which the functions are written for, and where a kernel runs and saves more time than its launch costs. No on a
    CPU, and for the few tokens of a decoding step, unless they are captured in a CUDA graph, where a launch costs nothing.

    Args:
        h: [batch, tokens, width] activation.

    Example:
        >>> steer.kernels.dispatch.wanted(torch.randn(2, 7, 32))  # on a CPU
        False
    """
    if torch.compiler.is_compiling() or _forced in ("triton", "op"):
        return True
    if choose_path(h) == "aten":
        return False
    return h.numel() >= MIN_NUMEL or torch.cuda.is_current_stream_capturing()


def choose_path(h: Tensor, opaque: bool = False) -> str:
    """The path for an activation: `aten`, `triton` or `op`.

    Args:
        h: the activation.
        opaque: compiled code is better off with an operator here, because Inductor would make several passes of the formula.

    Raises:
        ConfigError: Triton is forced where it cannot run.
    """
    compiling = torch.compiler.is_compiling()
    if _forced == "triton":
        if not can_run_triton(h):
            raise _triton_error(h)
        return "op" if compiling or needs_pytorch_operations(h) else "triton"
    if _forced != "auto":
        return _forced
    if not h.is_cuda or not can_run_triton(h):
        return "aten"
    if compiling:
        return "op" if opaque else "aten"
    return "aten" if needs_pytorch_operations(h) else "triton"


def needs_pytorch_operations(h: Tensor) -> bool:
    """Something looks at the PyTorch operations of a call: a tensor subclass, vmap or jvp, a tracer, a counter of operations."""
    return (
        type(h) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


# ---- errors


def _unknown_path_error(name: str) -> ConfigError:
    return ConfigError(
        f"unknown path '{name}' for kernels",
        expected=f"one of {', '.join(PATHS)}",
        found=name,
        remedy=f"choose one of these in force(...) or in the variable {VARIABLE}",
    )


def _triton_error(h: Tensor) -> ConfigError:
    return ConfigError(
        "the Triton path is forced, but cannot run here",
        expected="Triton, and a tensor in fp32, bf16 or fp16 on a GPU (or TRITON_INTERPRET=1)",
        found=f"{h.dtype} on {h.device}, Triton {'installed' if _has_triton else 'missing'}",
        remedy=f"take 'triton' out of force(...) or the variable {VARIABLE}",
    )


_forced = _check_path(os.environ.get(VARIABLE) or "auto")  # down here, since the check may raise an error of this file
_has_triton = importlib.util.find_spec("triton") is not None
