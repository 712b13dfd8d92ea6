"""Triton functions that are made at their first launch, so that this room can be imported where there is no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Kernel:
    """A function in Triton's language.

    Args:
        function: its source; its constants are arguments annotated `tl.constexpr`.
        inner: it is called by other kernels of its module and never launched.
    """

    def __init__(self, function: Callable[..., Any], inner: bool = False) -> None:
        self.function, self.inner, self.made = function, inner, None

    def jitted(self) -> Any:
        """Triton's own object; Triton finds the names that a kernel uses among the globals of its module."""
        if self.made is None:
            import triton
            import triton.language

            names = self.function.__globals__
            names["tl"] = triton.language
            self.made = triton.jit(self.function)
            for name, one in list(names.items()):
                if isinstance(one, Kernel) and one.inner:
                    names[name] = one.jitted()
        return self.made

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Runs it on the device of its first argument, whichever device is current."""
        kernel, device = self.jitted(), args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*args, enable_fp_fusion=True, **options)
        else:
            kernel[grid](*args, enable_fp_fusion=True, **options)


def jit(function: Callable[..., Any]) -> Kernel:
    """Makes a kernel of a function."""
    return Kernel(function)


def inline(function: Callable[..., Any]) -> Any:
    """Makes a part of kernels of a function."""
    return Kernel(function, inner=True)
