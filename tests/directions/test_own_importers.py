"""Importers of somebody else's that break the rules: the error names them, not the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer.directions.importer import IMPORTERS, Importer, Source, gathered
from steer.errors import ConfigError, DamagedFileError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    IMPORTERS.load()
    monkeypatch.setattr(IMPORTERS, "_entries", dict(IMPORTERS._entries))
    path = tmp_path / "vectors.abc"
    path.write_bytes(b"abc 123\n")
    return path


def register(read: Callable[[Source], Any], recognises: Callable[[Source], Any] = lambda source: True, **attributes: Any) -> None:
    methods = {"read": staticmethod(read), "recognises": staticmethod(recognises)}
    IMPORTERS.register("own")(type("Own", (Importer,), {"looks_for": "abc", **methods, **attributes}))


def vectors(source: Source, vector: Any) -> steer.Directions:
    return gathered(source, {source.place(0, "layers.{layer}.output"): vector}, method="own")


@pytest.mark.parametrize("format", ["own", None])
def test_one_by_the_rules(format, file):
    register(lambda source: vectors(source, torch.ones(4)))
    assert len(steer.import_directions(file, format)) == 1


@pytest.mark.parametrize("format", ["own", None])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"read": lambda source: 1 / 0}, r"the importer 'own' failed[\s\S]*ZeroDivisionError"),
        ({"read": lambda source: None}, r"the importer 'own' reads something else[\s\S]*Directions[\s\S]*NoneType"),
        ({"read": lambda source: {}}, r"the importer 'own' reads something else[\s\S]*dict"),
        ({"read": lambda source: None, "recognises": lambda source: 1 / 0}, r"the importer 'own' failed[\s\S]*ZeroDivisionError"),
        ({"read": lambda source: None, "recognises": lambda source: None}, r"the importer 'own' does not decide"),
        ({"read": lambda source: None, "looks_for": None}, r"the importer 'own' does not say what it reads"),
        ({"read": lambda source: None, "makes": "vectors"}, r"the importer 'own' does not say what it reads"),
    ],
)
def test_an_importer_at_fault_is_named(arguments, message, format, file):
    register(**arguments)
    with pytest.raises(ConfigError, match=message):
        steer.import_directions(file, format)


def test_something_else_than_an_importer(file):
    with pytest.raises(ConfigError, match=r"import format 'own' is none[\s\S]*derived from steer.directions.importer.Importer"):
        IMPORTERS.register("own")(lambda source: None)
    assert "own" not in IMPORTERS

    class Silent(Importer):
        makes = "directions"

    IMPORTERS.register("own")(Silent)
    with pytest.raises(ConfigError, match="the importer 'own' does not say what it reads"):
        steer.import_directions(file, "own")


@pytest.mark.parametrize("vector", [torch.ones(4) * 1j, [1j, 2.0], torch.ones(4).to_sparse(), torch.ones(4, device="meta")])
def test_vectors_that_would_lose_something(vector, file):
    register(lambda source: vectors(source, vector))
    with pytest.raises(DamagedFileError, match="a vector of numbers for each layer"):
        steer.import_directions(file, "own")
