"""Data files: rows of CSV, JSON and JSON-lines files and of data sets of the hub, with every fault named."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.errors import ConfigError, DamagedFileError, FileError
from steer.reading import damaged, parse_json, read_bytes, read_json


def table_rows(path: Path, columns: Iterable[str], *, delimiter: str | None = None) -> list[dict[str, str]]:
    """Rows of a CSV or TSV file with a head.

    Raises:
        DamagedFileError: a missing column or one that is there twice, a row of another length, no UTF-8, or no rows.
    """
    text = _text(path)
    delimiter = delimiter or ("\t" if path.suffix == ".tsv" else ",")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        head = list(reader.fieldnames or [])
        if missing := [name for name in columns if name not in head]:
            raise _missing_columns(path, missing, head)
        if twice := [name for name in head if head.count(name) > 1]:
            raise _columns_twice(path, twice[0])
        rows = list(reader)
    except csv.Error as error:
        raise damaged(path, "a table with one row a line", error) from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise _ragged_row(path, number, len(head), sum(value is not None for value in row.values()))
    if not rows:
        raise empty_file(path)
    return rows


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file. Raises DamagedFileError with the number of the line; NonFiniteError."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            row = parse_json(line, f"line {number} of '{path}'")
            if not isinstance(row, dict):
                raise _no_object(path, number, row)
            rows.append(row)
    if not rows:
        raise empty_file(path)
    return rows


def text_lines(path: Path) -> list[str]:
    """Lines of a text file, without those that are blank. Raises DamagedFileError for none."""
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise empty_file(path)
    return lines


def json_content(path: Path) -> Any:
    """Raises DamagedFileError, also for an empty file."""
    if not _text(path).strip():
        raise empty_file(path)
    return read_json(path)


def fields(row: Any, names: Mapping[str, type | tuple[type, ...]], path: object, place: object) -> list[Any]:
    """Values of a row, each of its type. Raises DamagedFileError."""
    if not isinstance(row, Mapping):
        raise damaged(str(path), f"an object with {', '.join(names)}", f"{type(row).__name__} at {place}")
    for name, kind in names.items():
        if name not in row:
            raise _missing_columns(str(path), [name], list(row), place)
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, str) and not value.strip():
            raise _wrong_field(str(path), name, value, place)
    return [row[name] for name in names]


def known_label(value: str, known: Sequence[str], what: str, path: object, place: object) -> str:
    """The value, one of a few. Raises DamagedFileError for an unknown label."""
    if value not in known:
        raise _unknown_label(str(path), what, value, known, place)
    return value


# ---- rows of the hub


def from_hub(name: str, config: str | None, split: str, what: str, extra: str, otherwise: str = "") -> list[dict[str, Any]]:
    """Rows of a data set of the hub, with the names of classes in place of their numbers.

    Args:
        what: is read from it, in words.
        extra: of the project, which installs the package `datasets`.
        otherwise: what else a reader can do without the hub, as an error says it.

    Raises:
        ConfigError: the package `datasets` is missing. FileError: the hub does not give the data set.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise _no_datasets(name, extra) from error
    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # no network, no such name, a script: each library version raises its own
        raise _not_on_hub(name, what, error, otherwise) from error
    return [_named_classes(row, table.features) for row in table]


def _named_classes(value: Any, feature: Any) -> Any:
    """Class numbers as their names, at any depth: the numbers differ between releases of a data set, the names do not."""
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value)
    inner = getattr(feature, "feature", feature)
    if isinstance(value, list):
        element = inner[0] if isinstance(inner, list) else inner
        return [_named_classes(entry, element) for entry in value]
    if isinstance(value, Mapping) and isinstance(inner, Mapping):
        return {key: _named_classes(entry, inner.get(key)) for key, entry in value.items()}
    return value


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, "text in UTF-8", error) from error


# ---- errors


def empty_file(path: object) -> DamagedFileError:
    """The error of a file without an item."""
    return damaged(str(path), "at least one item", "an empty file, or one that is not of this data set")


def no_such_form(path: object, forms: str, found: object) -> DamagedFileError:
    """The error of a file that is none of the forms of a data set."""
    return damaged(str(path), forms, found, remedy="convert it, or give the published file")


def _no_datasets(name: str, extra: str) -> ConfigError:
    return ConfigError(
        f"'{name}' of the hub needs the package datasets",
        expected=f"datasets, of the extra `{extra}`",
        found="no such package",
        remedy=f"pip install 'torchsteer[{extra}]', or give the path of a file",
    )


def _not_on_hub(name: str, what: str, error: Exception, otherwise: str) -> FileError:
    found = f"{type(error).__name__}: {str(error)[:200]}"
    remedy = f"check the name and the network, or give the path of a file{otherwise}"
    return FileError(f"the hub gave no {what}", expected=f"the data set '{name}'", found=found, remedy=remedy)


def _missing_columns(path: object, missing: Sequence[str], head: Sequence[str], place: object = None) -> DamagedFileError:
    where = "" if place is None else f" at {place}"
    found = f"{', '.join(map(str, head))}{where}"
    return damaged(str(path), f"the column {', '.join(missing)}", found, remedy="give the published file, with its head")


def _columns_twice(path: Path, name: str) -> DamagedFileError:
    return damaged(path, "every column once", f"'{name}' twice", remedy="give the published file, with its head")


def _ragged_row(path: Path, number: int, expected: int, found: int) -> DamagedFileError:
    return damaged(path, f"{expected} columns in every row", f"{found} or more in row {number}")


def _no_object(path: Path, number: int, row: object) -> DamagedFileError:
    return damaged(path, "an object in every line", f"{json.dumps(row)[:60]} in line {number}")


def _wrong_field(path: object, name: str, value: object, place: object) -> DamagedFileError:
    return damaged(str(path), f"a value of '{name}'", f"{value!r:.60} at {place}")


def _unknown_label(path: object, what: str, value: object, known: Sequence[str], place: object) -> DamagedFileError:
    return damaged(str(path), f"{what}: {', '.join(known)}", f"{value!r} at {place}", what=f"unknown label in {path}")
