"""Schedules: what a strength is multiplied with, as a function of the optimiser step. Pure, so a resumed run needs only the step."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from steer.checks import finite_number, whole_number
from steer.errors import ConfigError
from steer.registry import Registry


class Schedule(Protocol):
    def __call__(self, step: int) -> float: ...


SCHEDULES: Registry[type[Any]] = Registry("schedule")


def _positive(**values: int) -> None:
    for name, value in values.items():
        whole_number(value, f"schedule argument '{name}'")
        if value < 1:
            remedy = f"give {name} as optimiser steps, 1 or more"
            raise ConfigError(f"schedule argument '{name}' is too small", expected=">= 1", found=value, remedy=remedy)


def _finite(**values: float) -> None:
    for name, value in values.items():
        finite_number(value, f"schedule argument '{name}'")


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant:
    """The same factor at every step."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _finite(value=self.value)

    def __call__(self, step: int) -> float:
        return self.value


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line over `steps` optimiser steps, `end` afterwards."""

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        _finite(start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine over `steps` optimiser steps, `end` afterwards."""

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        _finite(start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2


@SCHEDULES.register("warmup_decay")
@dataclass(frozen=True)
class WarmupDecay:
    """Linear rise from 0 to 1 over `warmup` steps, level until `total - decay`, linear fall to 0 at `total`."""

    warmup: int
    decay: int
    total: int

    def __post_init__(self) -> None:
        _positive(warmup=self.warmup, decay=self.decay, total=self.total)
        if self.warmup + self.decay > self.total:
            raise ConfigError(
                "warm-up and decay overlap",
                expected=f"warmup + decay <= {self.total}, the total",
                found=f"{self.warmup} + {self.decay}",
                remedy="shorten one of them, or raise total",
            )

    def __call__(self, step: int) -> float:
        return max(0.0, min(1.0, step / self.warmup, (self.total - step) / self.decay))


def to_dict(schedule: Any) -> dict[str, Any]:
    """JSON form: the registered name and the arguments."""
    name = next((name for name in SCHEDULES if SCHEDULES.get(name) is type(schedule)), None)
    if name is None:
        raise ConfigError(
            f"schedule {schedule!r} is not registered",
            expected=f"one of {', '.join(SCHEDULES)}",
            found=type(schedule).__name__,
            remedy="decorate its class with @SCHEDULES.register('<name>')",
        )
    return {"name": name, **asdict(schedule)}


def from_dict(spec: Any) -> Any:
    """Inverse of `to_dict`; a plain name uses the defaults, None is constant 1, a schedule is returned as it is."""
    if spec is None:
        return Constant()
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
            expected=", ".join(str(one.replace(annotation=one.empty)) for one in inspect.signature(cls).parameters.values()),
            found=f"{arguments}: {error}",
            remedy="give it these arguments; those with a default may be left out",
        ) from error
