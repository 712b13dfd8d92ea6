"""GPU kernels, each beside its PyTorch reference.

The fused Triton kernels arrive in later releases: today the registry is empty and every intervention runs its PyTorch path.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "kernels":
    # A checkout on sys.path must not hide the distribution of that name, which transformers looks for.
    raise ImportError("this folder is steer.kernels, not the package 'kernels': run `pip install -e .` and import steer.kernels")

from steer.registry import Registry

KERNELS: Registry[Callable[..., Any]] = Registry("kernel")


def status() -> dict[str, Any]:
    """What could run here.

    Returns:
        `triton`: its version or None; `reason`: why it is missing or None; `device`: name of the GPU or None; `kernels`: sorted names.
    """
    import torch  # here, not above: asking for the names alone must stay cheap

    try:
        triton, reason = importlib.metadata.version("triton"), None
    except importlib.metadata.PackageNotFoundError:
        triton = None
        reason = "not installed" if sys.platform == "linux" else f"no triton for {sys.platform}"
    return {
        "triton": triton,
        "reason": reason,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": sorted(KERNELS),
    }
