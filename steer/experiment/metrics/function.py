"""Function of one's own as a metric: no class, no registration."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from steer.checks import of_type, one_of
from steer.entries import dotted, in_short, source_digest
from steer.errors import ConfigError, did_you_mean
from steer.experiment.metric import HIGHER, LOWER, METRICS, Item, Metric, name_of


@METRICS.register("function")
class Function(Metric):
    """What a function of yours gives: `f(model, tokenizer, items)` returns one number for each item, in their order or as {id: number}.

    The model is as the arm leaves it, with its plan attached, in evaluation mode and without gradients. For answers, call
    `steer.experiment.complete.complete(model, tokenizer, items, max_new_tokens=48)`, or derive from `GenerationMetric`, which shares them.

    Args:
        call: the function, or its import path `package.module:function`.
        unit: what the numbers are counted in.
        better: `higher` or `lower`.

    Raises:
        ConfigError: no function, a path that leads to none, or another number of values than items.
    """

    def __init__(self, call: str | Callable[..., Any], unit: str = "", better: str | None = None) -> None:
        of_type(unit, str, "unit of 'function'", "pass it as text, e.g. nat/token")
        self.function = imported(call) if isinstance(call, str) else call
        if not callable(self.function):
            raise _no_function(call, self.function)
        self.label = call if isinstance(call, str) else dotted(call).rpartition("<locals>.")[2].removeprefix("__main__.")
        self.unit = unit
        self.better = None if better is None else one_of(better, (HIGHER, LOWER), "better of 'function'")

    def code_digest(self) -> str | None:
        return source_digest(self.function)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> Mapping[str, float]:
        values, name = self.function(model, tokenizer, items), name_of(self)
        if isinstance(values, Mapping):
            return values
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise _no_values(name, values)
        numbers = values.tolist() if hasattr(values, "tolist") else list(values)  # of an array or a tensor
        if len(numbers) != len(items):
            raise _other_number(name, len(items), len(numbers))
        return dict(zip([item["id"] for item in items], numbers, strict=True))


def imported(path: str) -> Any:
    """What stands at `package.module:function`. Raises ConfigError saying which part is not there."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise _no_path(path)
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise _no_module(path, module_name, error) from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise _no_name(path, part, value)
        value = getattr(value, part)
    return value


# ---- errors


def _no_path(path: str) -> ConfigError:
    remedy = "name the module and the function in it, e.g. my_metrics:politeness"
    return ConfigError(f"'{path}' is no import path", expected="package.module:function", found=repr(path), remedy=remedy)


def _no_module(path: str, module: str, error: BaseException) -> ConfigError:
    what = f"the module of '{path}' cannot be imported"
    remedy = "install it, put its folder on PYTHONPATH, or mend it"
    return ConfigError(what, expected=f"a module {module}", found=in_short(error), remedy=remedy)


def _no_name(path: str, name: str, value: Any) -> ConfigError:
    known = [known for known in dir(value) if not known.startswith("_")]
    remedy = did_you_mean(name, known) or "name a function that is defined there"
    return ConfigError(
        f"'{path}' leads nowhere", expected=f"{name} in {getattr(value, '__name__', value)}", found="no such name", remedy=remedy
    )


def _no_function(call: Any, found: Any) -> ConfigError:
    remedy = "name a function f(model, tokenizer, items)"
    return ConfigError(f"'{call}' is no function", expected="what can be called", found=f"{type(found).__name__}", remedy=remedy)


def _no_values(call: str, values: Any) -> ConfigError:
    remedy = "return [number, ...] or {id: number, ...}"
    found = f"{type(values).__name__} {str(values)[:60]!r}"
    return ConfigError(f"the function '{call}' gives no numbers", expected="one number for each item", found=found, remedy=remedy)


def _other_number(call: str, items: int, found: int) -> ConfigError:
    remedy = "return one for each, in the order of the items"
    return ConfigError(
        f"the function '{call}' gives another number of values", expected=f"{items}, one for each item", found=found, remedy=remedy
    )
