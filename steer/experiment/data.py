"""Data sets of the experiments: JSON lines, shipped with the package or read from a folder."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from steer.errors import ConfigError, DamagedFileError

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
    wanted, fix = f"a JSON object a line with the texts {', '.join(keys)}", "write every line as one JSON object, in UTF-8"
    if not file.is_file():
        raise DamagedFileError(f"{file.name} is missing", expected=wanted, found=f"no {file}", remedy="add the file to the folder")
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise DamagedFileError(f"{file.name}, line {number} is not JSON", expected=wanted, found=line[:80], remedy=fix) from error
        if not isinstance(record, dict):
            raise DamagedFileError(f"{file.name}, line {number} is no object", expected=wanted, found=type(record).__name__, remedy=fix)
        if missing := [key for key in keys if not isinstance(record.get(key), str) or not record[key].strip()]:
            lacks = f"{file.name}, line {number} lacks {', '.join(missing)}"
            raise DamagedFileError(
                lacks, expected=wanted, found=list(record) or "no keys", remedy="give it these texts, none of them empty"
            )
        records.append(record)
    if not records:
        raise DamagedFileError(f"{file.name} has no lines", expected=wanted, found="an empty file", remedy="add some")
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
        raise ConfigError(
            f"no data set '{folder}'",
            expected=f"{', '.join(sorted(shipped))}, or a folder with {', '.join(f'{split}.jsonl' for split in SPLITS)}",
            found="no folder there",
            remedy="check experiment.data",
        )
    return {split: read_jsonl(root / f"{split}.jsonl", keys) for split, keys in SPLITS.items()}
