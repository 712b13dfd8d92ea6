"""Saved form of operators and gates from outside the package: what a file would not bring back is said when it is written."""

from __future__ import annotations

from typing import Any

from steer.checks import errors_of
from steer.errors import ConfigError
from steer.intervene.gate import GATES, SiteGate
from steer.intervene.operator import OPERATORS, TensorHolder

_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
_NOT_SAVED = ("tensors", "dry_runs", "number")  # the tensors have their own file; the others belong to a process


def check_restores(holder: TensorHolder) -> None:
    """Raises ConfigError for an operator or a gate that a plan file would bring back as something else.

    Its plain attributes are compared with those of the one that its file form gives, but for those whose name begins with an underscore.
    """
    kind = type(holder)
    if kind.__module__.partition(".")[0] == "steer":
        return
    what = f"gate '{holder.name}'" if isinstance(holder, SiteGate) else f"operator '{holder.name}'"
    registry: Any = GATES if isinstance(holder, SiteGate) else OPERATORS
    if holder.name not in registry or registry.get(holder.name) is not kind:
        raise _another_class(what, kind)
    options = holder.options()
    with errors_of(what, "let its constructor take its tensors and `options()` by their names, or override `restore`"):
        restored = kind.restore(dict(holder.tensors), options)
    for name, value in vars(holder).items():
        if name.startswith("_") or name in _NOT_SAVED or not isinstance(value, _PLAIN):
            continue
        again = getattr(restored, name, "no such attribute")
        if type(again) is not type(value) or again != value:
            raise _lost_attribute(what, name, value, again)


# ---- errors


def _another_class(what: str, kind: type) -> ConfigError:
    return ConfigError(
        f"{what} cannot be saved: its name stands for another class, or for none",
        expected="a class that is registered under its own name",
        found=f"{kind.__module__}.{kind.__qualname__}",
        remedy="decorate the class with @OPERATORS.register('<name>'), or @GATES.register for a gate",
    )


def _lost_attribute(what: str, name: str, value: Any, again: Any) -> ConfigError:
    return ConfigError(
        f"{what} cannot be saved: a file would not bring back its attribute '{name}'",
        expected=f"{value!r} after loading",
        found=f"{again!r}",
        remedy=f"an operator names it in `settings`, a gate returns it from `options()`; call it _{name} if it need not be kept",
    )
