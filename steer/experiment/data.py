"""Data sets of the experiments: JSON lines, shipped with the package or read from a folder."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from steer.errors import ConfigError, DamagedFileError
from steer.reading import parse_json

# split -> the texts that every line of its file needs; it may hold others
SPLITS = {
    "train": ("prompt", "answer"),
    "heldout": ("prompt", "trait", "neutral"),
    "contrast": ("prompt", "positive", "negative"),
    "probe": ("prompt",),
    "neutral_text": ("text",),
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


def load_dataset(folder: str) -> dict[str, list[dict[str, str]]]:
    """The splits train, heldout, contrast, probe and neutral_text of a data set.

    Args:
        folder: the name of a set that ships with the package (`tone`), or a path.

    Raises:
        ConfigError: no such set. DamagedFileError: a file is missing or has a bad line.
    """
    shipped = {entry.name: entry for entry in (files("steer.experiment") / "data").iterdir() if entry.is_dir()}
    root: Traversable = shipped.get(str(folder), Path(folder))
    if not root.is_dir():
        raise _no_data_set(folder, sorted(shipped))
    return {split: read_jsonl(root / f"{split}.jsonl", keys) for split, keys in SPLITS.items()}


# ---- errors


def _no_data_set(folder: str, shipped: list[str]) -> ConfigError:
    files_of_a_set = ", ".join(f"{split}.jsonl" for split in SPLITS)
    expected = f"{', '.join(shipped)}, or a folder with {files_of_a_set}"
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
