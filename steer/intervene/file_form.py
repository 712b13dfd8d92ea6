"""File forms that are proven: what is written of an operator, a gate or a schedule gives back an equal one.

A method of one's own that forgets to name a setting would come back with the default of its constructor, and steer differently.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.checks import errors_of, json_value, of_type
from steer.errors import ConfigError, SteerError
from steer.registry import Registry

if TYPE_CHECKING:
    from steer.intervene.operator import TensorHolder

_MADE_ANEW = ("number", "_over_mask")  # attributes that every gate makes for itself


def file_form(holder: TensorHolder, registry: Registry[Any]) -> tuple[str, dict[str, Any]]:
    """Registered name and options of an operator or a gate, which with its tensors make an equal one.

    Raises:
        ConfigError: its class is not registered, or an attribute that would be lost. NonFiniteError: a tensor, or an option.
    """
    name = registry.name_of(holder)
    with errors_of(f"`options` of {registry.kind} '{name}'", "return a dictionary of what the constructor takes beside the tensors"):
        options = holder.options()
    of_type(options, dict, f"what `options` of {registry.kind} '{name}' gives", "return a dictionary")
    tensors = {key: tensor.detach().cpu() for key, tensor in holder.tensors.items()}
    try:
        restored = type(holder).restore(dict(tensors), json_copy(options, f"{registry.kind} '{name}'"))
    except SteerError:
        raise
    except Exception as error:  # of a class that is not ours
        raise _not_restored(registry.kind, name, error) from error
    if not _same(tensors, {key: tensor.detach().cpu() for key, tensor in restored.tensors.items()}):
        raise _lost_tensors(registry.kind, name, tensors, restored.tensors)
    how = "name it in `settings`" if registry.kind == "operator" else "return it from options(), beside super().options()"
    check_restored(registry.kind, name, holder, restored, how)
    return name, options


def check_restored(kind: str, name: str, original: object, restored: object, how: str) -> None:
    """Compares the attributes of what was read with those of what was written. Raises ConfigError, which says how to keep one."""
    for attribute, value in getattr(original, "__dict__", {}).items():  # none where a dataclass has slots
        if attribute == "tensors" or attribute in _MADE_ANEW:
            continue
        if not hasattr(restored, attribute):
            raise _lost_attribute(kind, name, attribute, value, "nothing", how)
        read = getattr(restored, attribute)
        if not _same(value, read):
            raise _lost_attribute(kind, name, attribute, value, repr(read)[:60], how)


def json_copy(values: dict[str, Any], what: str) -> dict[str, Any]:
    """Values as a JSON file gives them back. Raises ConfigError, NonFiniteError for what it cannot hold."""
    json_value(values, what)
    copied: dict[str, Any] = json.loads(json.dumps(values))
    return copied


_TUPLE = "__tuple__"  # marks a list of a file that was a tuple


def with_tuples_marked(setting: Any) -> Any:
    """A setting as JSON keeps it."""
    if isinstance(setting, tuple):
        return {_TUPLE: [with_tuples_marked(entry) for entry in setting]}
    if isinstance(setting, list):
        return [with_tuples_marked(entry) for entry in setting]
    return {key: with_tuples_marked(entry) for key, entry in setting.items()} if isinstance(setting, dict) else setting


def with_tuples(setting: Any) -> Any:
    """Inverse of `with_tuples_marked`."""
    if isinstance(setting, dict):
        entries = {key: with_tuples(entry) for key, entry in setting.items()}
        return tuple(entries[_TUPLE]) if entries.keys() == {_TUPLE} else entries
    return [with_tuples(entry) for entry in setting] if isinstance(setting, list) else setting


def _same(a: Any, b: Any) -> bool:
    """Equal to the bit; a tuple equals a list, which is what JSON makes of it, and an object without an equality of its own one with equal
    attributes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if inspect.isroutine(a):
        return a is b or getattr(a, "__code__", a) == getattr(b, "__code__", b)
    if type(a) is type(b) and type(a).__eq__ is object.__eq__:
        return a is b or hasattr(a, "__dict__") and _same(vars(a), vars(b))
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # such as arrays, which compare entry by entry
        return False


# ---- errors


def _not_restored(kind: str, name: str, error: Exception) -> ConfigError:
    by_constructor = "give the constructor the names of the tensors and of the options"
    by_parts = "name its tensors in `parts`, and call super().__init__(tensors, width)"
    return ConfigError(
        f"{kind} '{name}' cannot be made again from what a file holds of it",
        expected="a class that takes back its own tensors and options, see docs/methods_of_your_own.md",
        found=f"{type(error).__name__}: {error}",
        remedy=by_constructor if kind == "gate" else by_parts,
    )


def _lost_tensors(kind: str, name: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> ConfigError:
    changed = [key for key in sorted({*written, *read}) if key not in written or key not in read or not _same(written[key], read[key])]
    return ConfigError(
        f"{kind} '{name}' changes its tensors when it is read from a file",
        expected=f"the tensors that were written: {', '.join(written) or 'none'}",
        found=f"other values of {', '.join(changed)}",
        remedy="let the constructor leave alone what it has made itself, e.g. not scale a vector twice",
    )


def _lost_attribute(kind: str, name: str, attribute: str, value: object, read: str, how: str) -> ConfigError:
    return ConfigError(
        f"{kind} '{name}' would lose its attribute '{attribute}' in a file",
        expected=f"{attribute}={str(value)[:60]} in what a file gives back",
        found=f"{read} in its place",
        remedy=how.replace(" it ", f" '{attribute}' ", 1),
    )
