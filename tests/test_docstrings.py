"""Every public callable has a docstring that says what it does, takes and raises, and an example that runs."""

from __future__ import annotations

import ast
import contextlib
import copy
import doctest
import importlib
import inspect
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import FILES, StandIns, keep_registries

import steer
from steer.intervene import METHODS
from steer.registry import public_classes

ROOT = Path(__file__).resolve().parents[1]


def public_packages() -> list[str]:
    """Packages with an `__all__`, found without importing any."""
    folders = {"steer": ROOT / "steer", "steer.callbacks": ROOT / "callbacks", "steer.kernels": ROOT / "kernels"}
    files = [(name, file) for name, folder in folders.items() for file in sorted(folder.rglob("__init__.py"))]
    return [
        ".".join([name, *file.parent.relative_to(folders[name]).parts])
        for name, file in files
        if "__all__ = " in file.read_text(encoding="utf-8")
    ]


PACKAGES = public_packages()


def public_callables(package: str) -> dict[str, Callable[..., Any]]:
    """By name in the package; what a package above it exports too belongs to the lower one."""
    module = importlib.import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    if package == "steer.intervene":
        found |= public_classes(METHODS)
    below = [other for other in PACKAGES if other.startswith(f"{package}.")]
    lower = {id(getattr(importlib.import_module(other), name)) for other in below for name in importlib.import_module(other).__all__}
    return {
        name: value for name, value in found.items() if (inspect.isfunction(value) or inspect.isclass(value)) and id(value) not in lower
    }


# ---- what a docstring says

# public name -> why nothing is asked of it
EXCEPTIONS = {"Probe": "`__doc__` is a property: a registered probe is explained by its function; steer.fit_probe has the example"}
NOT_RUN = {"calibrate": "needs a model that speaks: examples/calibrate.py, a guide and a notebook run it on the embedded one"}

# parameters that mean the same everywhere
SAME_EVERYWHERE = {
    "model": "a decoder, raw or wrapped",
    "tokenizer": "of the model; where None is allowed, the one that `steer.load` gave with it",
    "path": "of the file or folder that is read or written",
    "progress": "a bar where the output is a terminal; where it is a text, its label, and None for no bar",
    "seed": "of whatever is drawn by chance",
    "max_tokens": "padded tokens of a batch",
    "name": "what it is called in tables, files and logs",
    "plan": "a `steer.Plan`",
    "facts": "of a result: how it was measured, JSON-able; of an edit: the facts to write",
    "weight": "of a loss in the sum that is trained",
}


def docstring(value: Any) -> str:
    """Its own; a dataclass without one has its signature there."""
    text = value.__doc__ if isinstance(value.__doc__, str) else ""
    return "" if text.startswith(f"{getattr(value, '__name__', '')}(") else inspect.cleandoc(text)


def said_of(value: Any) -> str:
    """Docstring, for a class also of its constructor and of its bases, whose parameters and fields it has."""
    if inspect.isclass(value):
        parts = [base for base in value.__mro__ if base.__module__.startswith("steer.")]
        return "\n".join(docstring(part) for base in parts for part in (base, base.__init__))
    return docstring(value)


def is_error(value: Any) -> bool:
    """Errors and warnings are met, not called; docs/troubleshooting.md has a section for each error."""
    return inspect.isclass(value) and issubclass(value, Exception)


def unnamed_parameters(value: Any) -> list[str]:
    text = said_of(value)
    return [
        name
        for name in inspect.signature(value).parameters
        if name[0] != "_" and name not in SAME_EVERYWHERE and not re.search(rf"(?<![\w]){name}(?![\w])", text)
    ]


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the typed errors of the `raise` statements of a function; of those built by a function, what this returns."""
    source = inspect.unwrap(getattr(function, "__func__", function))
    if source.__code__.co_filename == "<string>":  # made by dataclass
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(source))).body[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            made_by = source.__globals__.get(node.exc.func.id)
            of = made_by.__annotations__.get("return") if inspect.isfunction(made_by) else getattr(made_by, "__name__", None)
            found |= set(re.findall(r"\w+Error", str(of)))
    return {name for name in found - {"SteerError"} if hasattr(steer.errors, name)}  # the base class: whatever was raised below


def unlisted_errors(value: Any) -> list[str]:
    if not inspect.isclass(value):
        return sorted(raised(value) - set(re.findall(r"\w+Error", said_of(value))))
    own = {base for base in value.__mro__ if base.__module__.startswith("steer.")}
    at_once = [vars(base)[name] for base in own for name in ("__init__", "__post_init__") if inspect.isfunction(vars(base).get(name))]
    return sorted(set().union(*map(raised, at_once)) - set(re.findall(r"\w+Error", said_of(value))))


def public_methods(value: type) -> dict[str, Any]:
    """Methods and properties that the class itself defines, but those that a base has explained."""
    own = {name: getattr(part, "fget", getattr(part, "__func__", part)) for name, part in vars(value).items() if name[0] != "_"}
    inherited = {name for base in value.__mro__[1:] for name in vars(base)}
    return {name: part for name, part in own.items() if inspect.isfunction(part) and name not in inherited}


def is_trivial(method: Callable[..., Any]) -> bool:
    """No parameters, and a name and a type that say all: `n_layers -> int`, `to_dict`."""
    return len(inspect.signature(method).parameters) < 2 and len(inspect.getsource(method).splitlines()) < 6


def faults(name: str, value: Any) -> Iterator[str]:
    first = docstring(value).split("\n")[0]
    if not re.search(r"\w.*\w", first):
        yield f"{name}: no docstring"
    if is_error(value):
        return
    if unnamed := unnamed_parameters(value):
        yield f"{name}: says nothing of {', '.join(unnamed)}"
    if unlisted := unlisted_errors(value):
        yield f"{name}: raises {', '.join(unlisted)}"
    if not examples(value):
        yield f"{name}: no example"
    for method_name, method in public_methods(value).items() if inspect.isclass(value) else ():
        if not docstring(method) and not is_trivial(method):
            yield f"{name}.{method_name}: no docstring"
        if unlisted := raised(method) - set(re.findall(r"\w+Error", docstring(method) + docstring(value))):
            yield f"{name}.{method_name}: raises {', '.join(sorted(unlisted))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_say_what_is_taken_and_raised(package: str) -> None:
    found = [fault for name, value in public_callables(package).items() if name not in EXCEPTIONS for fault in faults(name, value)]
    assert not found, "\n" + "\n".join(found)


def test_exceptions_are_public() -> None:
    assert {*EXCEPTIONS, *NOT_RUN} <= {name for package in PACKAGES for name in public_callables(package)}


# ---- examples


class ShownOutput(doctest.OutputChecker):
    """An example that shows no output may have any; `...` stands for what differs."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def examples(value: Any) -> list[doctest.Example]:
    _, mark, text = docstring(value).partition("Example:\n")
    return doctest.DocTestParser().get_examples(text) if mark else []


def run_examples(name: str, value: Any, package: str) -> str:
    """What went wrong, empty for nothing."""
    names = StandIns(importlib.import_module(package), steer, steer.callbacks, steer=steer, torch=torch, copy=copy)
    names[name] = value  # also where a stand-in is called alike
    test = doctest.DocTest(examples(value), {}, name, inspect.getsourcefile(inspect.unwrap(value)), 0, docstring(value))
    test.globs = names
    for file in FILES:
        if file in test.docstring:
            FILES[file](Path(file))
    said = io.StringIO()
    runner = doctest.DocTestRunner(ShownOutput(), verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.write, clear_globs=False)
    return said.getvalue()


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_of_docstrings_run(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_registries(monkeypatch)
    failed = []
    for number, (name, value) in enumerate(public_callables(package).items()):
        if name in NOT_RUN:
            continue
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        torch.manual_seed(0)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            failed += [text for text in [run_examples(name, value, package)] if text]
    assert not failed, "\n" + "\n".join(failed)
