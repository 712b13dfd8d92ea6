"""Cells of an experiment: one arm (one draw of a control), one seed, one model, in a folder named by the hash of what it is.

A cell is finished by `done.json`, which is written last and in one step; what is not finished is run again, or goes on from its checkpoint.
Two processes on one folder run no cell twice, since each holds a lease on the cell that it works on. An edited configuration makes other
cells, so that an old result never stands for a new question; a label or a place of output makes none.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steer.errors import ConfigError, DamagedFileError
from steer.experiment.lease import is_held, lease
from steer.files import atomic_write, check_seal, sealed
from steer.reading import read_json

DONE = "done.json"
BEGUN = "begun.txt"  # when its first run began; the times of a folder change with its contents
SCHEMA = 1
MEASURED_IN = "measured_in"  # in the spec of a cell, where it was not measured in float32
OF_ARM = ("treatment", "when", "control")  # what the spec of an arm's cell has beyond that of the experiment
_POLL = 2.0  # seconds between two looks at cells that somebody else runs


@dataclass(frozen=True)
class Cell:
    """One arm, draw and seed.

    Attributes:
        spec: all that its result depends on, JSON-able.
        needs: the cell whose weights it uses, if any.
    """

    arm: str
    draw: int
    seed: int
    spec: dict[str, Any] = field(repr=False, compare=False)
    needs: Cell | None = None

    @property
    def key(self) -> str:
        """SHA-256 of what its result depends on."""
        content = {
            "schema": SCHEMA,
            "draw": self.draw,
            "seed": self.seed,
            "spec": self.spec,
            "needs": self.needs.key if self.needs else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """For people, and for its folder."""
        draw = f".{self.draw}" if self.draw else ""
        return f"{re.sub('[^A-Za-z0-9.+-]+', '_', self.arm)}{draw}.seed{self.seed}.{self.key[:10]}"


class CellFolder:
    """The cells of an experiment on disk.

    Args:
        root: the folder that holds a folder for each cell.
        others: folders whose finished cells count, too.

    Raises:
        ConfigError: one of them is a file.
    """

    def __init__(self, root: str | Path, others: Sequence[str | Path] = ()) -> None:
        self.root = Path(root)
        self.others = [Path(other) for other in others]
        for folder in (self.root, *self.others):
            if folder.exists() and not folder.is_dir():
                raise _no_folder(folder)

    def of(self, cell: Cell) -> Path:
        """The folder of a cell: where it was finished, or is to be run."""
        places = [folder / cell.name for folder in (self.root, *self.others)]
        return next((place for place in places if (place / DONE).is_file()), places[0])

    def is_done(self, cell: Cell) -> bool:
        return (self.of(cell) / DONE).is_file()

    def seeds(self) -> list[int]:
        """Seeds of which any cell lies here, by the names of the folders."""
        named = (re.search(r"\.seed(\d+)\.[0-9a-f]{10}$", place.name) for root in (self.root, *self.others) for place in root.glob("*"))
        return sorted({int(found[1]) for found in named if found})

    def check_others(self, spec: dict[str, Any]) -> None:
        """Raises ConfigError when another folder holds a cell of another experiment. spec: what all cells of this one share."""
        for folder in self.others:
            files = sorted(folder.glob(f"*/{DONE}"))
            if not files:
                raise _no_cells(folder)
            for file in files:
                content = _read(file)
                theirs = content["spec"]
                if different := [name for name in {**spec, **theirs} if name not in OF_ARM and theirs.get(name) != spec.get(name)]:
                    raise _another_experiment(file, different)

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a finished cell found.

        Raises:
            ConfigError: it is not finished. DamagedFileError: it was altered, or is that of another cell.
        """
        file = self.of(cell) / DONE
        if not file.is_file():
            raise _unfinished(cell, file)
        content = _read(file)
        if content.get("key") != cell.key:
            raise _of_another_cell(file, cell, content.get("key"))
        return content["result"]

    def begin(self, cell: Cell) -> str:
        """Notes when a cell was first begun, and gives it: a time in ISO format."""
        file = self.of(cell) / BEGUN
        if not file.is_file():
            atomic_write(file, datetime.now(UTC).isoformat())
        return file.read_text(encoding="utf-8")

    def first_begun(self) -> str | None:
        """When the first cell that lies here was begun; None without one."""
        return min((file.read_text(encoding="utf-8") for file in self.root.glob(f"*/{BEGUN}")), default=None)

    def finish(self, cell: Cell, result: dict[str, Any]) -> None:
        """Writes the result of a cell, which is the last thing that happens to it."""
        content = {"key": cell.key, "arm": cell.arm, "draw": cell.draw, "seed": cell.seed, "spec": cell.spec, "result": result}
        atomic_write(self.of(cell) / DONE, json.dumps(sealed(content), indent=1, allow_nan=False))


def run_missing(cells: Sequence[Cell], folder: CellFolder, run: Callable[[Cell], dict[str, Any]]) -> Iterator[Cell]:
    """Runs the cells that are not finished, those that others need first, and gives each as soon as it is finished.

    A cell that another process works on is left to it; when nothing else is to be done, this waits for it.

    Args:
        run: makes the result of a cell, JSON-able, in its folder.
    """
    missing = [cell for cell in in_order(cells) if not folder.is_done(cell)]
    while missing:
        worked = False
        for cell in list(missing):
            if folder.is_done(cell):  # by somebody else
                missing.remove(cell)
                yield cell
                continue
            if cell.needs is not None and not folder.is_done(cell.needs):
                continue
            with lease(folder.of(cell)) as is_mine:
                if not is_mine:
                    continue
                if not folder.is_done(cell):  # in between
                    folder.begin(cell)
                    folder.finish(cell, run(cell))
            missing.remove(cell)
            worked = True
            yield cell
        if missing and not worked:
            time.sleep(_POLL)


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Every cell, and those that it needs, once, each behind what it needs."""
    ordered: dict[str, Cell] = {}  # by name: two arms may do the same
    for cell in cells:
        for needed in in_order([] if cell.needs is None else [cell.needs]):
            ordered.setdefault(needed.name, needed)
        ordered.setdefault(cell.name, cell)
    return list(ordered.values())


def state(cell: Cell, folder: CellFolder) -> str:
    """`done`, `running`, `begun` or `missing`."""
    if folder.is_done(cell):
        return "done"
    if is_held(folder.of(cell)):
        return "running"
    return "begun" if folder.of(cell).is_dir() else "missing"


def _read(file: Path) -> dict[str, Any]:
    """What a finished cell wrote."""
    try:
        content: dict[str, Any] = read_json(file)
        check_seal(content, file, is_required=True)
    except DamagedFileError as error:
        raise _damaged_cell(file, error) from error
    return content


# ---- errors


def _no_folder(path: Path) -> ConfigError:
    return ConfigError(f"'{path}' holds no cells", expected="a folder", found="a file", remedy="move it away, or choose another folder")


def _damaged_cell(file: Path, error: DamagedFileError) -> DamagedFileError:
    remedy = f"remove '{file.parent}' and run the experiment again: the other cells are kept"
    return DamagedFileError(error.what, expected=error.expected, found=error.found, remedy=remedy)


def _no_cells(folder: Path) -> ConfigError:
    remedy = "name the folder of an experiment"
    return ConfigError(f"'{folder}' holds no finished cell", expected=f"*/{DONE}", found="none", remedy=remedy)


def _another_experiment(file: Path, different: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"'{file.parent}' is a cell of another experiment",
        expected="cells that differ in arm, draw and seed alone",
        found=f"another {', '.join('experiment.precision' if name == MEASURED_IN else name for name in different)}",
        remedy="report them apart, or run this experiment with the same configuration",
    )


def _unfinished(cell: Cell, file: Path) -> ConfigError:
    remedy = "run the experiment: it runs the cells that are missing"
    return ConfigError(f"cell '{cell.name}' is not finished", expected=f"'{file}'", found="no such file", remedy=remedy)


def _of_another_cell(file: Path, cell: Cell, found: Any) -> DamagedFileError:
    remedy = f"remove '{file.parent}', and run the cell again"
    return DamagedFileError(f"'{file}' is the result of another cell", expected=f"key {cell.key}", found=found, remedy=remedy)
