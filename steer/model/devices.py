"""Where a model computes, which is not where its parameters lie when these are offloaded between calls; and chance on that device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from steer.errors import DeployError

P = ParamSpec("P")
T = TypeVar("T")


def input_device(model: nn.Module) -> torch.device:
    """The device that inputs of a model, or of a part of one, belong on; the CPU for a module without any parameter."""
    for module in model.modules():
        if (device := _execution_device(getattr(module, "_hf_hook", None))) is not None:
            return device
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


def _execution_device(hook: Any) -> torch.device | None:
    """Where accelerate loads the weights of a module for a call; None for a module that it leaves alone."""
    for part in getattr(hook, "hooks", None) or [hook]:
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    return None


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function whose first argument is a model in the dtypes of that model, also where autocast is on around the call."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):  # the function says what is wrong
            return function(*args, **kwargs)
        with torch.autocast(input_device(model).type, enabled=False):
            return function(*args, **kwargs)

    return run


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn within depends on a seed alone; the random state of the CPU and of a device is put back on every way out."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_weights_are_there(model: nn.Module, purpose: str) -> None:
    """Raises DeployError when weights are offloaded, so that they can be neither read nor written between calls."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise _offloaded(purpose, missing)


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """fp64, or fp32 on devices without it (mps)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


# ---- errors


def _offloaded(purpose: str, missing: list[str]) -> DeployError:
    return DeployError(
        f"{purpose} needs the weights, which are offloaded",
        expected="a model whose parameters are in memory",
        found=f"{len(missing)} parameters on 'meta', the first of them {missing[0]}",
        remedy="load the model without offloading (device_map=None, or one with room for all layers)",
    )
