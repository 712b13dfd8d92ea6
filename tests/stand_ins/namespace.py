"""The namespace of an example: what it assigns, stand-ins for what its text takes for granted, and names of packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest

from steer.registry import REGISTRIES

MAKERS: dict[str, Callable[[StandIns], Any]] = {}
PAGE_MAKERS: dict[str, Callable[[StandIns], Any]] = {}  # of the pages of docs/, whose model and tokenizer are simpler still


class StandIns(dict[str, Any]):
    """A dict of globals: a name that is not in it is made, or looked up, when the code first says it.

    Args:
        packages: whose public names an example may say without an import.
        makers: of the stand-ins.
        names: what it has already.
    """

    def __init__(self, *packages: ModuleType, makers: Mapping[str, Callable[[StandIns], Any]] = MAKERS, **names: Any) -> None:
        super().__init__(names)
        self._packages, self._makers = packages, makers

    def __missing__(self, name: str) -> Any:
        if name in self._makers:
            self[name] = self._makers[name](self)
            return self[name]
        for package in self._packages:
            if name in package.__all__:
                return getattr(package, name)
        raise KeyError(name)


def stand_in(make: Callable[[StandIns], Any]) -> Callable[[StandIns], Any]:
    """Makes the name of a function one of the namespace."""
    MAKERS[make.__name__] = make
    return make


def in_pages(make: Callable[[StandIns], Any]) -> Callable[[StandIns], Any]:
    """Makes the name of a function one that a page may take for granted."""
    PAGE_MAKERS[make.__name__] = make
    return make


def shared(make: Callable[[StandIns], Any]) -> Callable[[StandIns], Any]:
    """A stand-in that takes time and that no example changes: made once in a process, of stand-ins of its own."""
    once = functools.cache(lambda: make(StandIns()))
    MAKERS[make.__name__] = lambda names: once()
    return MAKERS[make.__name__]


def keep_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after the test."""
    for registry in list(REGISTRIES.values()):
        registry.load()  # one may bring others
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
