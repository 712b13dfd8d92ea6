"""Parts of the help that follow from the registered methods. The files are read, not imported: torch takes seconds, help must not."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from omegaconf import OmegaConf

_GATES = Path(__file__).parents[1] / "intervene" / "gates"
_REGISTRATION = re.compile(r"^@GATES\.register\(\"([\w-]+)\"\)", re.M)


def gate_kinds() -> str:
    """The gates that a configuration can make, e.g. `cosine, feature or probe`: all but `call`, which takes a Python function.

    Those of another package have the name of their entry point, unless it names a module.
    """
    names = {name for file in _GATES.glob("*.py") for name in _REGISTRATION.findall(file.read_text(encoding="utf-8"))} - {"call"}
    names |= {entry_point.name for entry_point in importlib.metadata.entry_points(group="steer.gates")}
    *first, last = sorted(names)
    return f"{', '.join(first)} or {last}"


def register() -> None:
    """Makes `${gate_kinds:}` known to the configuration files; it is worked out when a help text is printed."""
    OmegaConf.register_new_resolver("gate_kinds", gate_kinds, replace=True)
