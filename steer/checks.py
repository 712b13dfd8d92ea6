"""Checks of what a caller passes, made where it would otherwise fail later, or not at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError


def of_type(value: Any, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Raises ConfigError when a value is of another type."""
    if isinstance(value, kind):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    raise ConfigError(
        f"{what} is of the wrong type",
        expected=" or ".join(one.__name__ for one in kinds),
        found=f"{type(value).__name__} {str(value)[:60]!r}",
        remedy=remedy,
    )


def tensor_of(value: Any, what: str, remedy: str) -> Tensor:
    """A tensor, or what torch makes one of: numbers, lists of them, arrays. Raises ConfigError for anything else."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{what} is no tensor",
            expected="a tensor, an array, or a list of numbers",
            found=f"{type(value).__name__} {str(value)[:60]!r}",
            remedy=remedy,
        ) from error


def whole_number(value: Any, what: str, *, least: int = 0) -> None:
    """Raises ConfigError unless a value is an integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{what} is no whole number, or too small",
            expected=f"an integer, {least} or more",
            found=repr(value),
            remedy=f"pass an integer such as {max(least, 1)}",
        )


def finite_number(value: Any, what: str) -> None:
    """Raises ConfigError unless a value is one finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{what} is no finite number", expected="a finite number", found=repr(value), remedy="pass a number such as 1.0")
