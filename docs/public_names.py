"""The public names of the package, read from its source without importing it: what a room exports, and what registries know by a name.

A name is public when `steer` or a package below it exports it (`__all__`, or the table of lazy exports), or when a registry has it. Each is
traced to the module that defines it, through as many packages as hand it on.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"steer": ROOT / "steer", "steer.callbacks": ROOT / "callbacks", "steer.kernels": ROOT / "kernels"}

# a number of arXiv; authors and a year; a library whose form it is; or the word that it is nobody else's
CITATION = re.compile(
    r"\b\d{4}\.\d{4,5}\b|\b(?:et al\.?|[A-Z]\w+ (?:and|&) [A-Z]\w+|[A-Z]\w+|nostalgebraist),? \(?(?:19|20)\d\d\b"
    r"|\b(?:SAELens|sparsify|EasyEdit|steering-vectors)\b|\b[Oo]urs\b"
)

# what functions of a registry take and give, which their decorator makes methods of; other shapes are refused when they run
CONTRACTS = {
    "EXTRACTORS": "Each takes the moments of one site and gives a direction, [width], of any length.",
    "OBJECTIVES": "Each takes the log-probabilities of the answers of a batch of pairs, in nat, and gives a loss, [].",
    "PROBES": "Each takes activations x: [texts, width] and labels y: [texts], and gives weights, [width], and an intercept.",
    "METRICS": "Each takes what was measured at one site and gives one number for each direction, feature or dictionary, [tracked].",
}

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class PublicName:
    """One object of the reference.

    Attributes:
        path: where it is defined, e.g. `steer.model.load.load`.
        exports: the public paths it can be imported from, shortest first; none for a method that is known by its registered name alone.
        registered: its names in a registry.
        registry: the constant that the registry is, e.g. `OPERATORS`.
    """

    path: str
    exports: tuple[str, ...] = ()
    registered: tuple[str, ...] = ()
    registry: str | None = None

    @property
    def room(self) -> str:
        """The package of the first floor that it belongs to: of an export, or of its module."""
        of = next((path for path in self.exports if path.count(".") > 1), self.path)
        return of.split(".")[1]

    @property
    def title(self) -> str:
        return self.exports[0] if self.exports else self.path


@dataclass
class Source:
    """The modules of the package, parsed."""

    folders: dict[str, Path] = field(default_factory=lambda: dict(FOLDERS))
    _imports: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        found = {}
        for package, folder in self.folders.items():
            for file in sorted(folder.rglob("*.py")):
                inner = file.relative_to(folder).with_suffix("").parts
                found[".".join([package, *(part for part in inner if part != "__init__")])] = ast.parse(file.read_text(encoding="utf-8"))
        return found

    def file_of(self, module: str) -> str:
        """Path of a module's file below the root of the repository."""
        package = max((package for package in self.folders if f"{module}.".startswith(f"{package}.")), key=len)
        place = self.folders[package].joinpath(*module.removeprefix(package).split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        return file.relative_to(ROOT).as_posix()

    def introduction(self, module: str) -> str:
        """The docstring of a module."""
        return ast.get_docstring(self.modules[module]) or ""

    def node(self, path: str) -> Definition | None:
        """The class or function that is defined at a dotted path."""
        module, _, name = path.rpartition(".")
        body = self.modules[module].body if module in self.modules else []
        return next((node for node in body if isinstance(node, Definition) and node.name == name), None)

    def definition(self, module: str, name: str) -> str:
        """Dotted path of where a name that a module has is defined."""
        while (origin := self._imported(module).get(name)) is not None:
            module, name = origin
        return f"{module}.{name}"

    def _imported(self, module: str) -> dict[str, tuple[str, str]]:
        """Name -> module of the package it is imported from and its name there, lazy exports included."""
        if module not in self._imports:
            tree, lazy = self.modules[module], _assigned(self.modules[module], "_EXPORTS")
            names = {} if lazy is None else {name: (origin, name) for name, origin in ast.literal_eval(lazy).items()}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module in self.modules:
                    names.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
            self._imports[module] = names
        return self._imports[module]

    def exports(self) -> dict[str, str]:
        """Public path -> where it is defined, of everything that a package exports."""
        found = {}
        for module, tree in self.modules.items():
            if not self.file_of(module).endswith("__init__.py"):
                continue
            for name in _exported(tree):
                if not name.startswith("__"):
                    found[f"{module}.{name}"] = self.definition(module, name)
        return found

    def registered(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Where it is defined -> registry and names, of everything that a decorator registers."""
        found = {}
        for module, tree in self.modules.items():
            for node in tree.body:
                if isinstance(node, Definition):
                    calls = [call for call in node.decorator_list if isinstance(call, ast.Call) and _is_named(call)]
                    registries = [registry for call in calls if (registry := self._registry(module, call.func)) is not None]
                    if registries:
                        names = tuple(call.args[0].value for call in calls)  # type: ignore[attr-defined]  # `_is_named` saw it
                        found[f"{module}.{node.name}"] = registries[0], names
        return found

    def _registry(self, module: str, decorator: ast.expr) -> str | None:
        """The registry of a decorator: `EDITORS.register(...)`, or a function such as `extractor(...)`, which calls that."""
        if isinstance(decorator, ast.Attribute):
            return ast.unparse(decorator.value) if decorator.attr == "register" else None
        made_by = self.node(self.definition(module, ast.unparse(decorator)))
        found = None if made_by is None else re.search(r"\b([A-Z_]+)\.register\(name\)", ast.unparse(made_by))
        return found[1] if found else None

    def contract(self, name: PublicName) -> str:
        """What a function that a decorator makes a method of takes and gives; empty for others."""
        return CONTRACTS.get(name.registry or "", "") if isinstance(self.node(name.path), ast.FunctionDef) else ""

    def origin(self, name: PublicName) -> str:
        """The sentences that say where a method comes from: those of the docstring of its file, where it has none of its own."""
        node = self.node(name.path)
        if node is None or node.name.endswith(("Error", "Warning")) or cited(ast.get_docstring(node) or ""):
            return ""
        return cited(self.introduction(name.path.rpartition(".")[0]))

    @cached_property
    def public(self) -> list[PublicName]:
        """Everything public, each object once."""
        registered, exports = self.registered(), {}
        for path, definition in self.exports().items():
            exports.setdefault(definition, []).append(path)
        for definition, (registry, _) in registered.items():
            if registry in ("OPERATORS", "GATES", "SCHEDULES"):  # `steer.Add`: these are public by the name of their class
                exports.setdefault(definition, []).insert(0, f"steer.{definition.rpartition('.')[2]}")
        found = []
        for definition in exports.keys() | registered.keys():
            registry, names = registered.get(definition, (None, ()))
            paths = sorted(set(exports.get(definition, ())), key=lambda path: (path.count("."), path))
            found.append(PublicName(definition, tuple(paths), names, registry))
        return sorted(found, key=lambda name: name.title)


@cache
def package() -> Source:
    """The source of this repository, read once."""
    return Source()


def cited(text: str) -> str:
    """The sentences of a text that say where something comes from."""
    sentences = re.split(r"(?<=[.?)])\s+(?=[A-Z])|\n\n", text)
    return " ".join(sentence.replace("\n", " ") for sentence in sentences if CITATION.search(sentence))


def _exported(tree: ast.Module) -> list[str]:
    """The names of `__all__`; with a starred dictionary of lazy exports its keys."""
    value = _assigned(tree, "__all__")
    if value is None:
        return []
    if isinstance(value, ast.List) and not any(isinstance(item, ast.Starred) for item in value.elts):
        return list(ast.literal_eval(value))
    return list(ast.literal_eval(_assigned(tree, "_EXPORTS")))


def _assigned(tree: ast.Module, name: str) -> ast.expr | None:
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[union-attr]
    return None


def _is_named(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant)
