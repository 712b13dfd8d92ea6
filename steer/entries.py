"""Entries of registries: where a method was defined, and whether it is a later definition of another."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

from steer.errors import SteerError


def _code_of(entry: Any) -> Any:
    """The class or function that an entry is, or the function that it was made of by a decorator such as `@extractor`."""
    if isinstance(entry, type) or inspect.isroutine(entry):
        return entry
    return next((value for value in getattr(entry, "__dict__", {}).values() if inspect.isfunction(value)), type(entry))


def is_later_definition(entry: Any, registered: Any) -> bool:
    """It is what a cell of a notebook that runs again, or a module that is loaded again, makes in the place of an entry."""
    return type(entry) is type(registered) and entry is not registered and dotted(entry) == dotted(registered)


def module_of(entry: Any) -> str:
    """Dotted name of the module that an entry was defined in."""
    return str(getattr(_code_of(entry), "__module__", None) or "")


def dotted(entry: Any) -> str:
    """`package.module.Class` of an entry."""
    code = _code_of(entry)
    return ".".join(filter(None, (module_of(entry), str(getattr(code, "__qualname__", code)))))


def source_digest(entry: Any) -> str | None:
    """SHA-256 of the file that an entry of somebody else's is written in; None for our own, and for what has no file, as in a notebook."""
    module = module_of(entry)
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.split(".")[0] == __name__.split(".")[0] or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def first_line(entry: Any) -> str:
    """Of its own docstring; a class that has none would show that of its base, which says something else."""
    docstring = vars(entry).get("__doc__") if isinstance(entry, type) else entry.__doc__
    return inspect.cleandoc(docstring or "").split("\n")[0]


# ---- words for errors


def in_short(error: BaseException) -> str:
    """An error on one line."""
    told = f"{error.what} (expected {error.expected}; found {error.found})" if isinstance(error, SteerError) else str(error)
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def constant(kind: str) -> str:
    """Name of the registry of a kind in Python code."""
    names = {"import format": "IMPORTERS", "drift metric": "METRICS", "bias data set": "DATASETS"}
    return names.get(kind, f"{kind.upper()}S")


def with_article(kind: str) -> str:
    """A kind of method behind its article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
