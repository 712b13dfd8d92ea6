"""Registries of named methods: operators, gates, schedules, extractors, objectives, importers, drift metrics, metrics of experiments.

A new method is one new file in a folder of its kind, with one `@REGISTRY.register(name)`, and nothing else to edit: every module of that
folder is imported on the first look-up; one whose name begins with `_` may be a helper that registers nothing. Another package adds its
own methods through entry points:

    [project.entry-points."steer.operators"]
    shrink = "my_package.shrink"        # a module that registers, or "my_package.shrink:Shrink" for a class that does not

A file of the folder that cannot be imported is an error at every look-up. An entry point that cannot be used is a warning.
docs/methods_of_your_own.md has an example of each kind.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Generic, TypeVar

from steer.entries import constant, dotted, first_line, in_short, is_later_definition, module_of, with_article
from steer.errors import ConfigError, did_you_mean

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class Registry(Generic[T]):
    """Maps names to the classes or functions of one kind; plan files, the command line, the docs tables and the tests read it.

    Args:
        kind: what an entry is, in the singular, e.g. `operator`.
        package: dotted name of the folder whose modules register the entries; None when whoever registers is imported anyway.
        further: folders of other rooms that register entries too, those of their own domain.
        entry_points: group under which other packages announce theirs, e.g. `steer.operators`; None for none.
        subclass_of: class that every entry is derived from.
        instance_of: class that every entry is an instance of, where entries are no classes.

    Example:
        >>> from steer.intervene import OPERATORS
        >>> OPERATORS.get("add").__name__
        'Add'
    """

    def __init__(
        self,
        kind: str,
        package: str | None = None,
        entry_points: str | None = None,
        *,
        further: tuple[str, ...] = (),
        subclass_of: type | None = None,
        instance_of: type | None = None,
    ) -> None:
        self.kind = kind
        self.package = package
        self.folders = (() if package is None else (package,)) + further
        self.entry_points = entry_points
        self.subclass_of = subclass_of
        self.instance_of = instance_of
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._announced: set[str] = set()  # names of the entries that came by entry points
        self._problems: dict[importlib.metadata.EntryPoint, str | None] = {}  # of each that was tried, None where there is none
        self._folder_is_loaded = False
        self._is_loaded = False
        self._is_loading = False
        REGISTRIES[kind] = self

    # ---- registration

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that gives a class or function its name, which a class can read as `cls.name`.

        Raises:
            ConfigError: the name is taken, or is no name; the entry has a name already, or is not of this kind.
        """
        _check_name(self.kind, name)

        def add(entry: T) -> T:
            if not self.is_own(entry):
                self._load(entry_points=False)  # a name of ours is refused to the newcomer, rather than to our own file later
            self._check_free(name, entry)
            _check_kind(self, name, entry)
            _check_new(self, name, entry)
            if isinstance(entry, type):
                entry.name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            return entry

        return add

    def alias(self, name: str, of: str) -> None:
        """Lets an entry be found under a second name, by which the field knows it too; it stays one entry. Raises ConfigError."""
        _check_name(self.kind, name)
        if self._aliases.get(name) != of:
            self._check_free(name, of)
            self._aliases[name] = of

    def aliases_of(self, name: str) -> list[str]:
        """The other names of an entry."""
        return [alias for alias, of in self._aliases.items() if of == name]

    def is_own(self, entry: T) -> bool:
        """It comes from a folder of this registry, rather than from another package or from a script."""
        return module_of(entry).startswith(tuple(f"{folder}." for folder in self.folders))

    def is_announced(self, name: str) -> bool:
        """The entry of that name came by an entry point of another package."""
        return name in self._announced

    def _check_free(self, name: str, newcomer: object) -> None:
        if name in self._entries and is_later_definition(newcomer, self._entries[name]):
            return
        if name in self._entries or name in self._aliases:
            known_as = self._aliases.get(name, name)
            raise _taken_name(self.kind, name, self._entries.get(known_as, known_as), newcomer)

    # ---- look-up

    def get(self, name: str) -> T:
        """The entry of that name. Raises ConfigError with the known names and the nearest one."""
        self.load()
        known_as = self._aliases.get(name, name) if isinstance(name, str) else name
        if not isinstance(known_as, str) or known_as not in self._entries:
            raise _unknown(self, name)
        return self._entries[known_as]

    def name_of(self, method: object) -> str:
        """The name of the class of a method, by which a file or a text refers to it.

        Raises:
            ConfigError: the class has no name of its own. One that is derived from a registered class inherits the name, and what is
                written under it would be read as the registered class.
        """
        self.load()
        name = getattr(type(method), "name", None)
        registered = self._entries.get(name) if isinstance(name, str) else None
        if registered is None or registered is not type(method):
            raise _not_registered(self.kind, method, name, registered)
        return str(name)

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._entries or name in self._aliases

    def table(self) -> list[tuple[str, str]]:
        """(name, first line of the docstring) of every entry, for the docs and `steer info`."""
        return [(name, first_line(self._entries[name])) for name in self]

    def classes(self) -> list[Any]:
        """The entries that are classes, in the order of their registration."""
        self.load()
        return [entry for entry in self._entries.values() if isinstance(entry, type)]

    # ---- loading

    def load(self) -> None:
        """Imports the modules of the folder and the entry points of other packages, once. After an error or an interruption, the next
        look-up goes on with what is left.

        Raises:
            ConfigError: a module of the folder that cannot be imported, or that registers nothing.
        """
        self._load(entry_points=True)

    def _load(self, *, entry_points: bool) -> None:
        if self._is_loaded or self._is_loading:  # a module that is being imported may look something up itself
            return
        self._is_loading = True
        try:
            if not self._folder_is_loaded:
                for folder in self.folders:
                    self._load_folder(folder)
            self._folder_is_loaded = True
            if entry_points:
                self._load_entry_points()
                self._is_loaded = True
        finally:
            self._is_loading = False

    def _load_folder(self, package: str) -> None:
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            name = f"{package}.{found.name}"
            if name in sys.modules:
                continue
            try:
                with _undone_on_failure():
                    module = importlib.import_module(name)
            except (Exception, SystemExit) as error:
                raise _broken_module(self.kind, name, error) from error
            if not found.name.startswith("_") and not self._registers(module):
                del sys.modules[name]  # so that the next look-up says so again
                raise _idle_module(self.kind, name)

    def _load_entry_points(self) -> None:
        if self.entry_points is None:
            return
        for entry_point in importlib.metadata.entry_points(group=self.entry_points):
            if entry_point not in self._problems:
                problem = self._problem_of(entry_point)
                self._problems[entry_point] = problem
                if problem is not None:
                    warnings.warn(problem, stacklevel=5)

    def _problem_of(self, entry_point: importlib.metadata.EntryPoint) -> str | None:
        """Loads an entry point, and says why it cannot be used; None when it can."""
        before = set(self._entries)
        try:
            with _undone_on_failure():
                loaded = entry_point.load()
                if not isinstance(loaded, ModuleType):
                    if self._entries.get(entry_point.name) is not loaded:
                        self.register(entry_point.name)(loaded)
                elif not self._registers(loaded):
                    raise _idle_module(self.kind, loaded.__name__)
        except (Exception, SystemExit) as error:  # whatever another package raises must not take our own methods away
            return _broken_entry_point(self.kind, entry_point, error)
        self._announced |= set(self._entries) - before
        return None

    def _registers(self, module: ModuleType) -> bool:
        """An entry was defined in the module or in a part of it, or is known there."""
        name = module.__name__
        known_there = {id(value) for value in vars(module).values()}
        return any(f"{module_of(entry)}.".startswith(f"{name}.") or id(entry) in known_there for entry in self._entries.values())


REGISTRIES: dict[str, Registry[Any]] = {}


def public_classes(registries: Iterable[Registry[Any]]) -> dict[str, Any]:
    """The registered classes by the name under which Python code imports them. Where two classes have one name, that of the registry's own
    folder is meant, else the one that was registered first."""
    registries = tuple(registries)
    by_name: dict[str, Any] = {}
    for own in (True, False):
        for registry in registries:
            for cls in registry.classes():
                if registry.is_own(cls) is own:
                    by_name.setdefault(cls.__name__, cls)
    return by_name


@contextmanager
def _undone_on_failure() -> Iterator[None]:
    """Takes back what a module has registered before its import failed or was interrupted; the next import registers it again."""
    before = {kind: set(registry._entries) for kind, registry in REGISTRIES.items()}
    try:
        yield
    except BaseException:
        for kind, registry in REGISTRIES.items():
            for name in set(registry._entries) - before.get(kind, set()):
                if module_of(registry._entries[name]) not in sys.modules:  # Python has taken the module back
                    del registry._entries[name]
        raise


# ---- checks


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _no_name(kind, name)


def _check_kind(registry: Registry[Any], name: str, entry: object) -> None:
    base, made = registry.subclass_of, registry.instance_of
    if base is not None and not (isinstance(entry, type) and issubclass(entry, base)):
        raise _wrong_kind(registry.kind, name, entry, f"a class derived from {dotted(base)}")
    if made is not None and not isinstance(entry, made):
        raise _wrong_kind(registry.kind, name, entry, f"what the decorator in {made.__module__} makes of a function")


def _check_new(registry: Registry[Any], name: str, entry: Any) -> None:
    """Raises ConfigError for an entry that has a name already, and for two classes of the registry's own that Python code would confuse."""
    for known_as, registered in registry._entries.items():
        if registered is entry and known_as != name:
            raise _second_name(registry.kind, entry, known_as, name)
        if known_as == name:  # of which it is a later definition
            continue
        are_own_classes = all(isinstance(value, type) and registry.is_own(value) for value in (entry, registered))
        if are_own_classes and entry.__name__ == registered.__name__:
            raise _taken_class_name(registry.kind, entry, registered)


# ---- errors


def _unknown(registry: Registry[Any], name: object) -> ConfigError:
    own = "import the module that registers it, if it is one of your own"
    near = did_you_mean(str(name), [*registry._entries, *registry._aliases]) or "choose one of these"
    remedy = f"{near}; {own}" if registry.package else near
    problems = [problem for problem in registry._problems.values() if problem is not None]
    return ConfigError(
        f"unknown {registry.kind} '{name}'",
        expected=f"one of {', '.join(registry)}",
        found="; ".join([str(name), *problems]),
        remedy=f"{remedy}; or mend the other package" if problems else remedy,
    )


def _no_name(kind: str, name: object) -> ConfigError:
    bare = isinstance(name, type) or callable(name)
    return ConfigError(
        f"{dotted(name)} is registered as {kind} without a name" if bare else f"{name!r} cannot be the name of {with_article(kind)}",
        expected="a name of letters, digits, _ and -, that begins with a letter",
        found="a decorator without parentheses" if bare else f"{type(name).__name__} {name!r}",
        remedy=f"write the name into the decorator, e.g. @{constant(kind)}.register('my_method')",
    )


def _taken_name(kind: str, name: str, owner: object, newcomer: object) -> ConfigError:
    owned_by = f"another name of '{owner}'" if isinstance(owner, str) else f"the name of {dotted(owner)}"
    wanted_by = f"as another name of '{newcomer}'" if isinstance(newcomer, str) else f"by {dotted(newcomer)}"
    return ConfigError(
        f"{kind} '{name}' is registered twice",
        expected="a name that is not taken",
        found=f"it is {owned_by}, and wanted {wanted_by}",
        remedy="give one of the two another name",
    )


def _second_name(kind: str, entry: object, name: str, second: str) -> ConfigError:
    return ConfigError(
        f"{dotted(entry)} is registered as {kind} '{name}' already",
        expected=f"one name for it, '{name}'",
        found=f"a second one, '{second}'",
        remedy=f"leave the second out, or make it an alias: {constant(kind)}.alias('{second}', of='{name}')",
    )


def _taken_class_name(kind: str, entry: Any, registered: object) -> ConfigError:
    return ConfigError(
        f"two {kind}s of one folder have a class called {entry.__name__}",
        expected="a class name of its own, by which `steer` exports it",
        found=f"{dotted(registered)} and {dotted(entry)}",
        remedy="give the class another name",
    )


def _wrong_kind(kind: str, name: str, entry: object, expected: str) -> ConfigError:
    found = dotted(entry) if isinstance(entry, type) or callable(entry) else f"{type(entry).__name__} {str(entry)[:60]!r}"
    remedy = "docs/methods_of_your_own.md has an example of each kind"
    return ConfigError(f"what is registered as {kind} '{name}' is none", expected=expected, found=found, remedy=remedy)


def _not_registered(kind: str, method: object, name: object, registered: object) -> ConfigError:
    if registered is not None and is_later_definition(registered, type(method)):
        return _defined_again(kind, method, name)
    inherits = f", which would be read as {dotted(registered)}, registered as '{name}'" if registered is not None else ""
    return ConfigError(
        f"the class of {with_article(kind)} is not registered, so neither a file nor a text can name it",
        expected="a class with a registered name of its own",
        found=f"{dotted(type(method))}{inherits}",
        remedy=f"decorate the class with @{constant(kind)}.register('<name>')",
    )


def _defined_again(kind: str, method: object, name: object) -> ConfigError:
    return ConfigError(
        f"the class of {with_article(kind)} was defined again after it was made",
        expected=f"an object of the class that is registered as '{name}' now",
        found=f"one of an earlier definition of {dotted(type(method))}",
        remedy="make it, and what holds it, once more",
    )


def _broken_module(kind: str, module: str, error: BaseException) -> ConfigError:
    spec = importlib.util.find_spec(module)
    return ConfigError(
        f"the {kind} file {spec.origin if spec is not None else module} cannot be loaded",
        expected=f"a module that can be imported and registers {with_article(kind)}",
        found=in_short(error),
        remedy="mend the file, or take it out of the folder",
    )


def _idle_module(kind: str, module: str) -> ConfigError:
    return ConfigError(
        f"the module {module} registers no {kind}",
        expected=f"a class or function under @{constant(kind)}.register('<name>') or the decorator of its kind",
        found="nothing that is registered",
        remedy=f"register the {kind} there; a helper module of steer's own folders has a name that begins with _",
    )


def _broken_entry_point(kind: str, entry_point: importlib.metadata.EntryPoint, error: BaseException) -> str:
    distribution = entry_point.dist.name if entry_point.dist is not None else "an unknown package"
    return f"the {kind} '{entry_point.name}' of {distribution} ({entry_point.value}) cannot be used: {in_short(error)}"
