"""Schedules: what a strength is multiplied with, as a function of the optimiser step. Pure, so a resumed run needs only the step."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any, ClassVar

from steer.checks import finite_number, whole_number
from steer.errors import ConfigError
from steer.registry import Registry


class Schedule:
    """A pure function of the optimiser step, counted from 0. A new one is a file of `steer.intervene.schedules` with one dataclass."""

    name: ClassVar[str]

    def __call__(self, step: int) -> float:
        """The factor of a strength at this step."""
        raise NotImplementedError


SCHEDULES: Registry[type[Schedule]] = Registry("schedule", "steer.intervene.schedules", "steer.schedules")


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


def to_dict(schedule: Any) -> dict[str, Any]:
    """JSON form: the registered name and the arguments."""
    name = str(getattr(type(schedule), "name", ""))
    if name not in SCHEDULES or SCHEDULES.get(name) is not type(schedule):
        raise ConfigError(
            f"schedule {schedule!r} is not registered",
            expected=f"one of {', '.join(SCHEDULES)}",
            found=type(schedule).__name__,
            remedy="decorate its class with @SCHEDULES.register('<name>')",
        )
    return {"name": name, **asdict(schedule)}  # type: ignore[call-overload]


def from_dict(spec: Any) -> Any:
    """Inverse of `to_dict`; a plain name uses the defaults, None is constant 1, a schedule is returned as it is."""
    if spec is None:
        return SCHEDULES.get("constant")()
    if isinstance(spec, str):
        spec = {"name": spec}
    if not hasattr(spec, "keys"):
        if not callable(spec):
            raise ConfigError(
                "a schedule is of the wrong type",
                expected=f"a name ({', '.join(SCHEDULES)}), a mapping with one, or a schedule",
                found=repr(spec),
                remedy="e.g. schedule=Linear(steps=100), or leave it out for a constant strength",
            )
        return spec
    arguments = dict(spec)
    cls = SCHEDULES.get(arguments.pop("name", ""))
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"schedule '{spec['name']}' does not take these arguments",
            expected=", ".join(str(argument.replace(annotation=argument.empty)) for argument in inspect.signature(cls).parameters.values()),
            found=f"{arguments}: {error}",
            remedy="give it these arguments; those with a default may be left out",
        ) from error
