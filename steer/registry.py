"""Registries of named methods: operators, gates, schedules, extractors, objectives, importers, drift metrics.

A new method is one new file in the folder of its kind, with one `@REGISTRY.register(name)`, and nothing else to edit: every module of that
folder is imported on the first look-up. Another package adds its own methods through entry points:

    [project.entry-points."steer.operators"]
    shrink = "my_package.shrink"        # a module that registers, or "my_package.shrink:Shrink" for a class that does not
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

from steer.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to the classes or functions of one kind; plan files, the command line, the docs tables and the tests read it.

    Args:
        kind: what an entry is, in the singular, e.g. `operator`.
        package: dotted name of the folder whose modules register the entries; None when whoever registers is imported anyway.
        entry_points: group under which other packages announce theirs, e.g. `steer.operators`; None for none.

    Example:
        >>> from steer.intervene import OPERATORS
        >>> OPERATORS.get("add").__name__
        'Add'
    """

    def __init__(self, kind: str, package: str | None = None, entry_points: str | None = None) -> None:
        self.kind, self.package, self.entry_points = kind, package, entry_points
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        REGISTRIES[kind] = self

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that gives a class or function its name, which a class can read as `cls.name`.

        Raises:
            ConfigError: the name is taken.
        """

        def add(entry: T) -> T:
            self._check_free(name)
            if isinstance(entry, type):
                entry.name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            return entry

        return add

    def alias(self, name: str, of: str) -> None:
        """Lets an entry be found under a second name, by which the field knows it too; it stays one entry."""
        self._check_free(name)
        self._aliases[name] = of

    def get(self, name: str) -> T:
        """The entry of that name. Raises ConfigError with the known names and the nearest one."""
        self.load()
        known_as = self._aliases.get(name, name) if isinstance(name, str) else name
        if not isinstance(known_as, str) or known_as not in self._entries:
            raise self._unknown(name)
        return self._entries[known_as]

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._entries or name in self._aliases

    def table(self) -> list[tuple[str, str]]:
        """(name, first line of the docstring) of every entry, for the docs and `steer info`."""
        return [(name, (inspect.getdoc(self._entries[name]) or "").split("\n")[0]) for name in self]

    def classes(self) -> dict[str, T]:
        """The entries that are classes, by the name under which Python code imports them."""
        self.load()
        return {entry.__name__: entry for entry in self._entries.values() if isinstance(entry, type)}

    def load(self) -> None:
        """Imports the modules of the folder and the entry points of other packages, once."""
        if self._loaded:
            return
        self._loaded = True  # before the imports, which may look something up themselves
        try:
            if self.package is not None:
                import_modules(importlib.import_module(self.package))
        except BaseException:
            self._loaded = False  # the next look-up says again what is wrong
            raise
        if self.entry_points is not None:
            for entry_point in importlib.metadata.entry_points(group=self.entry_points):
                self._load_entry_point(entry_point)

    def _load_entry_point(self, entry_point: importlib.metadata.EntryPoint) -> None:
        try:
            loaded = entry_point.load()
            if not isinstance(loaded, ModuleType) and loaded not in self._entries.values():
                self.register(entry_point.name)(loaded)
        except Exception as error:  # whatever another package raises must not take our own methods away
            warnings.warn(_broken_entry_point(self.kind, entry_point, error), stacklevel=2)

    def _check_free(self, name: str) -> None:
        if name in self._entries or name in self._aliases:
            raise ConfigError(
                f"{self.kind} '{name}' is registered twice",
                expected="a name that is not taken",
                found=f"{self._entries[self._aliases.get(name, name)]!r} under it",
                remedy="give one of the two another name",
            )

    def _unknown(self, name: object) -> ConfigError:
        where = f", or put a file that registers it into {self.package.replace('.', '/')}/" if self.package else ""
        return ConfigError(
            f"unknown {self.kind} '{name}'",
            expected=f"one of {', '.join(self)}",
            found=name,
            remedy=did_you_mean(str(name), [*self._entries, *self._aliases]) or f"choose one of these{where}",
        )


REGISTRIES: dict[str, Registry[Any]] = {}


def import_modules(package: ModuleType) -> None:
    """Imports every module that lies directly in a package."""
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        if name not in sys.modules:
            importlib.import_module(name)


def _broken_entry_point(kind: str, entry_point: importlib.metadata.EntryPoint, error: Exception) -> str:
    distribution = entry_point.dist.name if entry_point.dist is not None else "an unknown package"
    return f"the {kind} '{entry_point.name}' of {distribution} ({entry_point.value}) cannot be used: {type(error).__name__}: {error}"
