"""Checks of what a caller passes, made where it would otherwise fail later, or not at all."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError, NonFiniteError, SteerError, did_you_mean


def of_type(value: Any, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Raises ConfigError when a value is of another type."""
    if not isinstance(value, kind):
        raise _wrong_type(value, kind if isinstance(kind, tuple) else (kind,), what, remedy)


def level_of_caller() -> int:
    """The `stacklevel` with which the function that asks warns at the line of whoever called the library, however deep that is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("steer", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


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
        raise _no_tensor(value, what, remedy) from error


@contextmanager
def errors_of(method: str, remedy: str) -> Iterator[None]:
    """Raises ConfigError with the name of a method for what its code raises, from the original.

    Typed errors, and want of memory, which programs answer with a smaller batch, go through as they are.

    Args:
        method: kind and name, e.g. `extractor 'pca'`.
        remedy: what to do about it.
    """
    try:
        yield
    except (SteerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _method_raised(method, error, remedy) from error


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
        raise _wrong_value(value, what, f"an integer, {least} or more", f"pass an integer such as {max(least, 1)}")


def finite_number(value: Any, what: str, *, above: float = -math.inf) -> None:
    """Raises ConfigError unless a value is one finite number, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        expected = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        raise _wrong_value(value, what, expected, "pass a number such as 1.0")


def number_within(value: Any, what: str, least: float, most: float = math.inf) -> None:
    """Raises ConfigError unless a value is a number from `least` to `most`, both included; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        expected = f"a number from {least:g} to {most:g}" if most < math.inf else f"a number of {least:g} or more"
        raise _wrong_value(value, what, expected, "pass a number such as 0.1")


def one_of(value: Any, known: Sequence[str], what: str) -> Any:
    """The value, one of a few names. Raises ConfigError with the nearest one."""
    if not isinstance(value, str) or value not in known:
        raise _no_such_name(value, known, what)
    return value


def json_value(value: object, where: str) -> None:
    """Raises ConfigError, or NonFiniteError, for what JSON would change: it turns integer keys into text, and other readers refuse NaN."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise _key_is_no_string(key, where)
            json_value(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            json_value(inner, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _non_finite_value(where, value)
    elif not (value is None or isinstance(value, str | int)) or isinstance(value, int) and value.bit_length() > 1023:
        raise _no_json_value(where, value)


# ---- errors


def _wrong_type(value: Any, kinds: tuple[type, ...], what: str, remedy: str) -> ConfigError:
    expected = " or ".join(kind.__name__ for kind in kinds)
    return ConfigError(f"wrong type for {what}", expected=expected, found=f"{type(value).__name__} {str(value)[:60]!r}", remedy=remedy)


def _method_raised(method: str, error: Exception, remedy: str) -> ConfigError:
    found = f"{type(error).__name__}: {str(error)[:300]}"
    return ConfigError(f"{method} failed", expected="a method that runs to its end", found=found, remedy=remedy)


def _no_tensor(value: Any, what: str, remedy: str) -> ConfigError:
    expected = "a tensor, an array, or a list of real numbers, dense and in memory"
    found = f"{type(value).__name__} {str(value)[:60]!r}"
    return ConfigError(f"no tensor can be made of {what}", expected=expected, found=found, remedy=remedy)


def _wrong_value(value: Any, what: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError(f"wrong value for {what}", expected=expected, found=repr(value), remedy=remedy)


def _no_such_name(value: Any, known: Sequence[str], what: str) -> ConfigError:
    remedy = did_you_mean(str(value), known) or "choose one of these"
    return ConfigError(f"wrong value for {what}", expected=f"one of {', '.join(known)}", found=repr(value), remedy=remedy)


def _key_is_no_string(key: object, where: str) -> ConfigError:
    remedy = f"write it as {str(key)!r}"
    return ConfigError(f"key {key!r} of {where} is no string", expected="a string", found=type(key).__name__, remedy=remedy)


def _no_json_value(where: str, value: object) -> ConfigError:
    expected = "a JSON value (text, number that a float can hold, boolean, list, dict or None)"
    remedy = "convert it, e.g. with .tolist() or str()"
    return ConfigError(f"{where} is no JSON value", expected=expected, found=type(value).__name__, remedy=remedy)


def _non_finite_value(where: str, value: float) -> NonFiniteError:
    remedy = "leave it out, or store None in its place"
    return NonFiniteError(f"{where} is not finite", expected="a finite number", found=value, remedy=remedy)
