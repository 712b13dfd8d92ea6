"""Named methods: a new operator, schedule, extractor or metric is one file and one `@registry.register(name)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from steer.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to classes or functions of one kind; plan files, the CLI, the docs table and the tests read it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        REGISTRIES[kind] = self

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            self._check_free(name)
            self._entries[name] = entry
            return entry

        return add

    def alias(self, name: str, of: str) -> None:
        """Lets an entry be found under a second name, by which the field knows it too; it stays one entry."""
        self._check_free(name)
        self._aliases[name] = of

    def _check_free(self, name: str) -> None:
        if name in self._entries or name in self._aliases:
            raise ConfigError(
                f"{self.kind} '{name}' is registered twice",
                expected="a name that is not taken",
                found=f"{self.get(name)!r} under it",
                remedy="give one of the two another name",
            )

    def get(self, name: str) -> T:
        """Raises ConfigError with the known names and the nearest one."""
        name = self._aliases.get(name, name) if isinstance(name, str) else name
        if not isinstance(name, str) or name not in self._entries:
            near = did_you_mean(str(name), [*self._entries, *self._aliases])
            raise ConfigError(
                f"unknown {self.kind} '{name}'",
                expected=f"one of {', '.join(sorted(self._entries))}",
                found=name,
                remedy=near or "choose one of these, or import the file that registers it",
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def table(self) -> list[tuple[str, str]]:
        """(name, first line of the docstring) of every entry, for the docs and `steer info`."""
        return [(name, (inspect.getdoc(entry) or "").split("\n")[0]) for name, entry in sorted(self._entries.items())]


REGISTRIES: dict[str, Registry[Any]] = {}
