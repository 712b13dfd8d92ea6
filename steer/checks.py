"""Checks of what a caller passes, made where it would otherwise fail later, or not at all."""

from __future__ import annotations

import math
import operator
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
        f"wrong type for {what}",
        expected=" or ".join(one.__name__ for one in kinds),
        found=f"{type(value).__name__} {str(value)[:60]!r}",
        remedy=remedy,
    )


def tensor_of(value: Any, what: str, remedy: str) -> Tensor:
    """A tensor, or what torch makes one of: numbers, lists of them, arrays. Raises ConfigError for anything else."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError("no plain numbers")
        return tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no tensor can be made of {what}",
            expected="a tensor, an array, or a list of real numbers, dense and in memory",
            found=f"{type(value).__name__} {str(value)[:60]!r}",
            remedy=remedy,
        ) from error


def integer(value: Any) -> Any:
    """An integer of numpy or torch as one of Python's. Anything else, a bool too, is returned as it is, for the check that follows."""
    if isinstance(value, bool) or isinstance(value, Tensor) and value.dtype is torch.bool:
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def whole_number(value: Any, what: str, *, least: int = 0) -> None:
    """Raises ConfigError unless a value is an integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"wrong value for {what}",
            expected=f"an integer, {least} or more",
            found=repr(value),
            remedy=f"pass an integer such as {max(least, 1)}",
        )


def finite_number(value: Any, what: str, *, above: float = -math.inf) -> None:
    """Raises ConfigError unless a value is one finite number, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        expected = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        raise ConfigError(f"wrong value for {what}", expected=expected, found=repr(value), remedy="pass a number such as 1.0")


def number_within(value: Any, what: str, least: float, most: float = math.inf) -> None:
    """Raises ConfigError unless a value is a number from `least` to `most`, both included; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        expected = f"a number from {least:g} to {most:g}" if most < math.inf else f"a number of {least:g} or more"
        raise ConfigError(f"wrong value for {what}", expected=expected, found=repr(value), remedy="pass a number such as 0.1")
