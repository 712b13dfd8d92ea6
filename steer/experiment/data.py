"""Data sets of the experiments: JSON lines, shipped with the package or read from a folder."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from steer.errors import ConfigError, DamagedFileError


def read_jsonl(file: Traversable, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """One object a line, each with these keys. Raises DamagedFileError naming the line."""
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DamagedFileError(f"{file.name}, line {number} is not JSON", found=line[:80]) from error
        if missing := [key for key in keys if not isinstance(record.get(key), str) or not record[key].strip()]:
            raise DamagedFileError(f"{file.name}, line {number} lacks {', '.join(missing)}", expected=keys, found=list(record))
        records.append(record)
    if not records:
        raise DamagedFileError(f"{file.name} has no lines")
    return records


def load_dataset(folder: str) -> dict[str, list[dict[str, str]]]:
    """The splits train, heldout, contrast, probe and neutral_text of a data set.

    Args:
        folder: the name of a set that ships with the package (`tone`), or a path.
    """
    root: Traversable = files("steer.experiment") / "data" / folder
    if not root.is_dir():
        root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"no data set '{folder}'", expected="'tone', or a folder with train.jsonl, heldout.jsonl, contrast.jsonl, ...")
    keys = {
        "train": ("prompt", "answer"),
        "heldout": ("prompt", "trait", "neutral"),
        "contrast": ("prompt", "positive", "negative"),
        "probe": ("prompt",),
        "neutral_text": ("text",),
    }
    return {split: read_jsonl(root / f"{split}.jsonl", wanted) for split, wanted in keys.items()}
