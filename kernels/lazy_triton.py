"""`triton` and `tl` for the kernel files: the real ones are imported at the first launch.

    from steer.kernels.lazy_triton import tl, triton

    @triton.jit
    def _copy_kernel(x_ptr, out_ptr, n_numbers, BLOCK_SIZE: tl.constexpr): ...

    _copy_kernel[(n_programs,)](x_ptr=x, out_ptr=out, n_numbers=n, BLOCK_SIZE=1024, num_warps=4)

So a kernel file reads as it would with Triton itself, can be imported where there is no Triton (macOS), and does not load it where no
kernel is launched. A launch takes keywords only, the first of which is a tensor, and runs on the device of that tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

tl: Any = None  # replaced by triton.language in the module of a kernel, before Triton looks there for the names that the kernel uses


class LazyKernel:
    """A function in Triton's language that is not handed to Triton before it is launched, or called by a kernel that is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._jit_function: Any = None

    @property
    def name(self) -> str:
        """Module and function, for example `steer_add.forward`."""
        return f"{self.function.__module__.split('.')[-1]}.{self.function.__name__.strip('_').removesuffix('_kernel')}"

    def jit_function(self) -> Any:
        """The function as `triton.jit` returns it."""
        if self._jit_function is None:
            names = self.function.__globals__
            names["tl"] = importlib.import_module("triton.language")
            for name in self.function.__code__.co_names:  # Triton accepts only its own objects as functions that a kernel calls
                if isinstance(names.get(name), LazyKernel):
                    names[name] = names[name].jit_function()
            self._jit_function = importlib.import_module("triton").jit(self.function)
        return self._jit_function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What launches it: `kernel[grid](x_ptr=x, ..., num_warps=4)`."""
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Runs it. arguments: those of the kernel, beginning with a tensor, and Triton's own (num_warps, num_stages)."""
        run = self.jit_function()[grid]
        device = next(iter(arguments.values())).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton would launch it on the current device
            with torch.cuda.device(device):
                run(**arguments, enable_fp_fusion=True)
        else:
            run(**arguments, enable_fp_fusion=True)


class _Triton:
    """What the kernel files use of the package `triton`."""

    jit: Any = LazyKernel  # Any: to a type checker, what kernels call are plain functions


triton = _Triton
