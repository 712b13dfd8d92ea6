"""The rows of an evaluation that is under way: one line of JSON each, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.edits.edit import Edit
from steer.edits.evaluation import EditRow
from steer.errors import ConfigError, DamagedFileError
from steer.files import atomic_write, storage_errors
from steer.reading import damage_of, parse_json, place_of, read_bytes

ROWS, EDITS = "rows.jsonl", "edits"


class EvaluationStore:
    """Rows and edits of one evaluation in a folder.

    Args:
        folder: is made where it is missing.
        facts: what the rows depend on, JSON-able: weights, records, measures, editor, options, mode, neutral texts.

    Raises:
        ConfigError: the folder holds rows of another evaluation. DamagedFileError: a line before the last that cannot be read.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder = place_of(folder)
        self.file = self.folder / ROWS
        self.rows: list[EditRow] = []
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if not self.file.exists():
            atomic_write(self.file, json.dumps({"digest": digest}) + "\n")
            return
        head, *lines = read_bytes(self.file).decode(errors="replace").split("\n")
        if parse_json(head, f"line 1 of '{self.file}'") != {"digest": digest}:
            raise _of_another(self.folder)
        whole = lines[:-1]  # what stands behind the last end of a line was cut off while it was written
        for number, line in enumerate(whole, 2):
            with damage_of(self.file, f"a row in line {number}"):
                row = EditRow(**parse_json(line, f"line {number}"))
            self.rows.append(row)
        if lines and lines[-1]:
            atomic_write(self.file, "\n".join([head, *whole, ""]))

    def add(self, row: EditRow) -> None:
        """Writes a row."""
        self.rows.append(row)
        line = json.dumps(asdict(row), allow_nan=False) + "\n"
        with storage_errors(self.file, len(line)), self.file.open("a", encoding="utf-8") as file:
            file.write(line)

    def add_edit(self, row: EditRow, edit: Edit) -> None:
        """Writes an edit of a sequence, then its row."""
        edit.save(self._path(len(self.rows)))
        self.add(row)

    def edits(self) -> list[Edit]:
        """The edits of the rows of a sequence, in their order. Raises DamagedFileError where one is missing."""
        done = [number for number, row in enumerate(self.rows) if not row.problem]
        if missing := [number for number in done if not self._path(number).exists()]:
            raise _edit_is_missing(self._path(missing[0]))
        return [Edit.load(self._path(number)) for number in done]

    def _path(self, number: int) -> Path:
        return self.folder / EDITS / f"{number:05d}.safetensors"


# ---- errors


def _of_another(folder: Path) -> ConfigError:
    return ConfigError(
        f"'{folder}' holds rows of another evaluation",
        expected="rows of the same weights, records, measures, editor, options (contexts, covariance, guards), neutral texts and mode",
        found="others",
        remedy="name another folder, or remove it",
    )


def _edit_is_missing(path: Path) -> DamagedFileError:
    remedy = "remove the folder and run the sequence from its beginning"
    return DamagedFileError(f"{path} is missing", expected="every edit that the rows are about", found="nothing there", remedy=remedy)
