"""Which kernels there are, and what could run them here."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import torch

from steer.kernels.dispatch import forced
from steer.registry import Registry

KERNELS: Registry[Callable[..., Any]] = Registry("kernel")


def status() -> dict[str, Any]:
    """What could run here: `status()["device"]`.

    Returns:
        `triton`: its version or None; `reason`: why it is missing or None; `device`: name of the GPU or None; `path`: the one that is
        forced, or `auto`; `kernels`: sorted names.

    Example:
        >>> steer.kernels.status()["path"]
        'auto'
    """
    try:
        triton, reason = importlib.metadata.version("triton"), None
    except importlib.metadata.PackageNotFoundError:
        triton, reason = None, "not installed" if sys.platform == "linux" else f"no triton for {sys.platform}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"triton": triton, "reason": reason, "device": device, "path": forced(), "kernels": sorted(KERNELS)}
