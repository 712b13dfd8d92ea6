"""Data sets of the experiments: JSON lines, shipped with the package or read from a folder."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from steer.errors import ConfigError, DamagedFileError
from steer.reading import parse_json

# split -> the texts that every line of its file needs where the experiment reads it; it may hold others
SPLITS = {
    "train": ("prompt", "answer"),
    "contrast": ("prompt", "positive", "negative"),
    "probe": ("prompt",),
}


def read_jsonl(file: Traversable, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """One object a line, each with these keys; empty lines are skipped. Raises DamagedFileError naming the file and the line."""
    if not file.is_file():
        raise _missing_file(file, keys)
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, f"line {number}")
        except ValueError as error:  # DamagedFileError and NonFiniteError are ValueErrors
            raise _bad_line(file, number, keys, "is not JSON", found=line[:80]) from error
        if not isinstance(record, dict):
            raise _bad_line(file, number, keys, "is no object", found=type(record).__name__)
        if missing := [key for key in keys if not isinstance(record.get(key), str) or not record[key].strip()]:
            raise _missing_texts(file, number, keys, missing, record)
        records.append(record)
    if not records:
        raise _empty_file(file, keys)
    return records


class DataSet:
    """A folder of JSON lines, one file a split: `train`, `contrast`, `probe`, and those that the outcomes are measured on.

    Args:
        folder: the name of a set that ships with the package (`tone`), or a path.

    Raises:
        ConfigError: no such set.
    """

    def __init__(self, folder: str | Path) -> None:
        shipped = {entry.name: entry for entry in (files("steer.experiment") / "data").iterdir() if entry.is_dir()}
        self.name = str(folder)
        self.root: Traversable = shipped.get(self.name, Path(folder))
        if not self.root.is_dir():
            raise _no_data_set(self.name, sorted(shipped))
        self._splits: dict[str, list[dict[str, str]]] = {}

    def split(self, name: str, keys: tuple[str, ...] | None = None) -> list[dict[str, str]]:
        """The rows of a split. Raises DamagedFileError naming file and line: it is missing, or a row lacks one of the texts `keys`."""
        file = self.root / f"{name}.jsonl"
        if name not in self._splits:
            self._splits[name] = read_jsonl(file, SPLITS.get(name, ()))
        if any(not isinstance(row.get(key), str) or not row[key].strip() for row in self._splits[name] for key in keys or ()):
            read_jsonl(file, keys or ())  # raises, with the line
        return self._splits[name]

    def digest(self, *splits: str) -> str:
        """SHA-256 of the rows of some splits."""
        rows = {split: self.split(split) for split in splits}
        return hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ---- errors


def _no_data_set(folder: str, shipped: list[str]) -> ConfigError:
    expected = f"{', '.join(shipped)}, or a folder with a file for each split, such as contrast.jsonl and heldout.jsonl"
    return ConfigError(f"no data set '{folder}'", expected=expected, found="no folder there", remedy="check experiment.data")


def _wanted(keys: tuple[str, ...]) -> str:
    return f"a JSON object a line with the texts {', '.join(keys)}"


def _missing_file(file: Traversable, keys: tuple[str, ...]) -> DamagedFileError:
    remedy = "add the file to the folder"
    return DamagedFileError(f"{file.name} is missing", expected=_wanted(keys), found=f"no {file}", remedy=remedy)


def _empty_file(file: Traversable, keys: tuple[str, ...]) -> DamagedFileError:
    return DamagedFileError(f"{file.name} has no lines", expected=_wanted(keys), found="an empty file", remedy="add some")


def _bad_line(file: Traversable, number: int, keys: tuple[str, ...], fault: str, *, found: object) -> DamagedFileError:
    remedy = "write every line as one JSON object, in UTF-8"
    return DamagedFileError(f"{file.name}, line {number} {fault}", expected=_wanted(keys), found=found, remedy=remedy)


def _missing_texts(file: Traversable, number: int, keys: tuple[str, ...], missing: list[str], record: dict[str, Any]) -> DamagedFileError:
    what = f"{file.name}, line {number} lacks {', '.join(missing)}"
    remedy = "give it these texts, none of them empty"
    return DamagedFileError(what, expected=_wanted(keys), found=list(record) or "no keys", remedy=remedy)
