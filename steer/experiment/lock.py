"""The locked question: what an experiment asks, written down and hashed before its first cell, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steer.errors import ConfigError
from steer.files import atomic_write, check_seal, sealed
from steer.reading import read_json

FILE = "prereg.json"


def write_lock(folder: Path, design: Mapping[str, Any], first_cell: str | None) -> Path:
    """Locks a design: `prereg.json` is written once, and never again.

    Args:
        design: question, contrasts, outcomes with their margins, arms, seeds, and hashes of data and plans, JSON-able.
        first_cell: when the first cell of the experiment began, if one did.

    Raises:
        ConfigError: the folder is locked already, or has cells: a question that is asked afterwards confirms nothing.
    """
    file = folder / FILE
    if file.exists():
        raise _locked_already(file)
    if first_cell is not None:
        raise _too_late(folder, first_cell)
    content = {"locked": datetime.now(UTC).isoformat(), "design": dict(design)}
    return atomic_write(file, json.dumps(sealed(content), indent=1, allow_nan=False))


def check_lock(folder: Path, design: Mapping[str, Any], first_cell: str | None) -> dict[str, Any]:
    """What the page says of the lock.

    Args:
        design: as it is now.
        first_cell: as of `write_lock`.

    Returns:
        confirmatory: the lock is older than the first cell, and the design is the locked one. locked: when, None without a lock.
        deviations: what is not as it was locked, in a sentence each.

    Raises:
        DamagedFileError: the lock was altered.
    """
    file = folder / FILE
    if not file.exists():
        return {"confirmatory": False, "locked": None, "deviations": []}
    content = read_json(file)
    check_seal(content, file, is_required=True)
    deviations = [
        f"{name}: locked {_short(was)}, now {_short(now)}" for name, was, now in _differences(content["design"], dict(design), "")
    ]
    if first_cell is not None and datetime.fromisoformat(first_cell) < datetime.fromisoformat(content["locked"]):
        deviations.insert(0, f"the first cell began {first_cell}, before the lock")
    return {"confirmatory": not deviations, "locked": content["locked"], "deviations": deviations}


def _differences(was: Any, now: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return [
            difference
            for key in dict.fromkeys([*was, *now])
            for difference in _differences(was.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if json.dumps(was, sort_keys=True) == json.dumps(now, sort_keys=True) else [(name, was, now)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- errors


def _locked_already(file: Path) -> ConfigError:
    return ConfigError(
        "this experiment is locked already",
        expected="a folder without prereg.json",
        found=f"'{file}'",
        remedy="ask another question in another folder: folder=outputs/<name>",
    )


def _too_late(folder: Path, first_cell: str) -> ConfigError:
    return ConfigError(
        "it is too late to lock this question",
        expected="a folder without cells",
        found=f"a cell in '{folder}' that began {first_cell}",
        remedy="lock before the first cell, in another folder: folder=outputs/<name>",
    )
