"""Schedules: what a strength is multiplied with, as a function of the optimiser step. Pure, so a resumed run needs only the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.checks import errors_of, finite_number, whole_number
from steer.errors import ConfigError, NonFiniteError
from steer.intervene.file_form import check_restored, json_copy
from steer.registry import Registry


class Schedule:
    """A pure function of the optimiser step, counted from 0. A new one is a file of `steer.intervene.schedules` with one dataclass.

    Example:
        >>> schedule = steer.intervene.SCHEDULES.get("linear")(steps=100)
        >>> [schedule(step) for step in (0, 50, 200)]
        [0.0, 0.5, 1.0]
    """

    name: ClassVar[str]

    def __call__(self, step: int) -> float:
        """The factor of a strength at this step."""
        raise NotImplementedError


SCHEDULES: Registry[type[Schedule]] = Registry("schedule", "steer.intervene.schedules", "steer.schedules", subclass_of=Schedule)


def check_positive(**values: int) -> None:
    """Raises ConfigError for an argument that is no number of optimiser steps."""
    for name, value in values.items():
        whole_number(value, f"schedule argument '{name}'")
        if value < 1:
            remedy = f"give {name} as optimiser steps, 1 or more"
            raise ConfigError(f"schedule argument '{name}' is too small", expected=">= 1", found=value, remedy=remedy)


def check_finite(**values: float) -> None:
    """Raises ConfigError for an argument that is no finite number."""
    for name, value in values.items():
        finite_number(value, f"schedule argument '{name}'")


def factor_at(schedule: Any, step: int, owner: str = "") -> float:
    """The factor of a strength at an optimiser step. owner: name of the intervention, for errors.

    Raises:
        ConfigError: it is no real number, or the schedule fails. NonFiniteError: NaN or infinity.

    Example:
        >>> factor_at(Linear(steps=4), 1)
        0.25
    """
    what = f"schedule {schedule!r} of '{owner}'" if owner else f"schedule {schedule!r}"
    with errors_of(f"{what} at step {step}", "let it take an optimiser step, an integer from 0 on, and return a number"):
        factor = schedule(step)
    if isinstance(factor, Tensor) and not factor.dim() and not factor.is_meta:
        factor = factor.item()
    elif hasattr(factor, "dtype") and callable(getattr(factor, "item", None)) and getattr(factor, "ndim", None) == 0:
        factor = factor.item()  # a number of numpy
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise _no_factor(what, step, factor)
    if not math.isfinite(factor):
        raise _infinite_factor(what, step, factor)
    return float(factor)


def check_product(strengths: Sequence[float], factor: float, name: str) -> None:
    """Raises NonFiniteError when a strength times the factor of its schedule is beyond what fp32 holds. name: of the intervention."""
    largest = max(map(abs, strengths)) * abs(factor)
    if not largest <= torch.finfo(torch.float32).max:
        raise _too_strong(name, largest)


def to_dict(schedule: Any) -> dict[str, Any]:
    """JSON form: the registered name and the arguments. Raises ConfigError for a schedule that it would not give back."""
    name = SCHEDULES.name_of(schedule)
    if not is_dataclass(schedule):
        raise _no_dataclass(schedule)
    arguments = asdict(schedule)  # type: ignore[arg-type]
    if "name" in arguments:
        raise _field_called_name(schedule)
    restored = from_dict({"name": name, **json_copy(arguments, f"schedule '{name}'")})
    check_restored("schedule", name, schedule, restored, "make it a field of the dataclass")
    return {"name": name, **arguments}


def from_dict(spec: Any) -> Any:
    """Inverse of `to_dict`; a plain name uses the defaults, None is constant 1, a schedule is returned as it is.

    Raises:
        ConfigError: no schedule, unknown arguments, or a schedule that gives no number at step 0. NonFiniteError: NaN or infinity there.
    """
    if spec is None:
        return SCHEDULES.get("constant")()
    if isinstance(spec, str):
        spec = {"name": spec}
    if not hasattr(spec, "keys"):
        if not callable(spec) or isinstance(spec, type):
            raise _no_schedule(spec)
        factor_at(spec, 0)
        return spec
    arguments = dict(spec)
    cls = SCHEDULES.get(arguments.pop("name", ""))
    try:
        schedule = cls(**arguments)
    except TypeError as error:
        raise _wrong_arguments(cls, arguments, error) from error
    factor_at(schedule, 0)
    return schedule


# ---- errors


def _no_dataclass(schedule: Schedule) -> ConfigError:
    return ConfigError(
        f"schedule '{schedule.name}' has no file form",
        expected="a dataclass, whose fields are the arguments of the schedule",
        found=f"{type(schedule).__module__}.{type(schedule).__qualname__}, a plain class",
        remedy="put @dataclass(frozen=True) below @SCHEDULES.register(...), and the arguments into fields",
    )


def _field_called_name(schedule: Any) -> ConfigError:
    return ConfigError(
        f"a field of the schedule {type(schedule).__qualname__} is called 'name'",
        expected="another name: files, and schedule={'name': ...}, know a schedule by it",
        found="name",
        remedy="rename the field",
    )


def _no_schedule(spec: Any) -> ConfigError:
    instance = f"the class {spec.__name__}: call it, e.g. {spec.__name__}(...)" if isinstance(spec, type) else None
    return ConfigError(
        "a schedule is of the wrong type",
        expected=f"a name ({', '.join(SCHEDULES)}), a mapping with one, or a schedule",
        found=instance or repr(spec),
        remedy="e.g. schedule=Linear(steps=100), or leave it out for a constant strength",
    )


def _wrong_arguments(cls: type[Schedule], arguments: dict[str, Any], error: TypeError) -> ConfigError:
    known = inspect.signature(cls).parameters.values()
    return ConfigError(
        f"schedule '{cls.name}' does not take these arguments",
        expected=", ".join(str(argument.replace(annotation=argument.empty)) for argument in known),
        found=f"{arguments}: {error}",
        remedy="give it these arguments; those with a default may be left out",
    )


def _no_factor(what: str, step: int, factor: Any) -> ConfigError:
    return ConfigError(
        f"{what} gives no factor of a strength",
        expected="one real number at every optimiser step",
        found=f"{type(factor).__name__} {str(factor)[:60]!r} at step {step}",
        remedy="return a number such as min(step / 100, 1.0)",
    )


def _infinite_factor(what: str, step: int, factor: float) -> NonFiniteError:
    return NonFiniteError(
        f"{what} is not finite",
        expected="a finite factor at every step",
        found=f"{factor} at step {step}",
        remedy="correct the numbers of the schedule",
    )


def _too_strong(name: str, largest: float) -> NonFiniteError:
    return NonFiniteError(
        f"strength x schedule of '{name}' is beyond fp32",
        expected=f"at most {torch.finfo(torch.float32).max:.3g}",
        found=f"{largest:.3g}",
        remedy="lower the strength, or the numbers of the schedule",
    )
