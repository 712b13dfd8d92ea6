"""Drift store: the records of one training run in one SQLite file that is only ever added to. `steer.drift.writer` writes it.

Why SQLite: it comes with Python, is one file, can be read while training writes, and one measurement (all directions of a step) is one
transaction, there as a whole or not at all. Why a rollback journal and not WAL: the file at rest is complete by itself, so it can be
copied, and it works on network file systems, where WAL does not. `synchronous=EXTRA` makes a commit survive a power cut, which matters
because a checkpoint that is written next relies on the records before it; a commit costs milliseconds, once per check.

Why attempts: a run that is killed has recorded steps that its last checkpoint knows nothing of. Resuming opens a new attempt that says from
which step it goes on, and the view `current` hides what earlier attempts recorded after that step. Nothing is updated or deleted (triggers
refuse it), so what the dead attempt saw stays in `records` and `metrics`.
"""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from steer.drift import schema
from steer.drift.measurement import MODES
from steer.drift.metric import METRICS, RECORD_FIELDS
from steer.drift.records import DriftRecord
from steer.drift.site_directions import CONTROLS, KINDS, TrackedDirection
from steer.errors import ConfigError, DamagedFileError, FileError, StorageFullError, WrongKindError
from steer.reading import parse_json, place_of, size_of

_FIELDS = RECORD_FIELDS[:-1]  # all but the metrics
_MAY_BE_MISSING = (float, int, type(None))
# column of `current` -> type of its values, or the words that it may have; metric and value are NULL in a record without any
_COLUMNS: dict[str, Any] = dict(zip(_FIELDS, (int, MODES, str, str, KINDS, int), strict=True))
_COLUMNS |= {"metric": (str, type(None)), "value": _MAY_BE_MISSING}


class StoreInUseError(FileError):
    """Another process writes to this drift store."""


class DriftStore:
    """Reads a store, also while a training run writes to it.

    Args:
        path: an existing file, of this schema or of schema 1.

    Raises:
        FileError: there is no such file. DamagedFileError: it is no database, or a damaged one. WrongKindError: another database, or a
        store of another schema.

    Example:
        >>> tracker = steer.DriftTracker({"kind": direction}, probe=probe, store="drift.sqlite")
        >>> with tracker.attached(model):
        ...     records = tracker.measure(0)
        >>> with steer.drift.DriftStore("drift.sqlite") as store:
        ...     curve = store.series("kind", "layers.12.output")
        ...     print(curve["step"], curve["effect_sd"])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = place_of(path)
        if not self.path.exists() or self.path.is_dir():
            raise _no_store(self.path)
        check_files(self.path)
        with typed_errors(
            self.path
        ):  # read-write even to read: what a killed writer left half-done is rolled back by whoever opens the file
            self._db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=30, isolation_level=None)
        try:
            with typed_errors(self.path):
                self._check_kind()
                self._db.execute("PRAGMA query_only = 1")
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.path}')"

    def _check_kind(self) -> None:
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._schema()
        if application != schema.APPLICATION or version not in schema.READABLE:
            is_empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            raise _wrong_kind(self.path, application, version, is_empty)
        if altered := schema.altered(self._db, version):
            raise _altered_tables(self.path, altered)
        findings = [row[0] for row in self._db.execute("PRAGMA quick_check(3)")]
        if findings != ["ok"]:
            raise _damaged_inside(self.path, findings)

    def _schema(self) -> int:
        return self._db.execute("PRAGMA user_version").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the model the records are about."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'fingerprint'", {"value": str})
        fingerprint = parse_json(rows[0][0] if rows else "", f"the fingerprint in drift store '{self.path}'")
        if not isinstance(fingerprint, dict):
            raise _wrong_value(self.path, "fingerprint", dict, fingerprint)
        return fingerprint

    def tracked(self) -> list[TrackedDirection]:
        """Every direction and feature at every site, in the order in which they were first tracked."""
        kinds = {"direction": str, "site": str, "kind": KINDS, "gap": _MAY_BE_MISSING, "sha256": str}
        return [TrackedDirection(*row) for row in self._rows(f"SELECT {', '.join(kinds)} FROM tracked ORDER BY rowid", kinds)]

    def attempts(self) -> list[dict[str, Any]]:
        """attempt, from_step (-1 for a start from scratch), started (ISO time)."""
        kinds = {"attempt": int, "from_step": int, "started": str}
        rows = self._rows(f"SELECT {', '.join(kinds)} FROM attempts ORDER BY attempt", kinds)
        return [dict(zip(kinds, row, strict=True)) for row in rows]

    def _rows(self, select: str, kinds: Mapping[str, Any], filters: Mapping[str, Any] = {}) -> list[tuple[Any, ...]]:
        """What a query gives. Raises DamagedFileError for a value that is not of the type of its column: SQLite keeps any in any."""
        with typed_errors(self.path):
            rows = self._db.execute(select, filters).fetchall()
        columns = list(kinds.items())
        for row in rows:
            for value, (name, kind) in zip(row, columns, strict=True):
                if value not in kind if kind in (MODES, KINDS) else not isinstance(value, kind):
                    raise _wrong_value(self.path, name, kind, value)
        return rows

    def records(
        self, *, direction: str | None = None, site: str | None = None, mode: str | None = None, kind: str | None = None
    ) -> list[DriftRecord]:
        """Records that no later attempt has superseded, by step; the arguments filter."""
        asked = {"direction": direction, "site": site, "mode": mode, "kind": kind}
        filters = {name: value for name, value in asked.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in filters) or "1"
        metrics: dict[tuple[Any, ...], dict[str, float]] = {}  # the other fields of a record -> its metrics
        with typed_errors(self.path), self._snapshot():
            select = f"SELECT {', '.join(_COLUMNS)} FROM {schema.current(self._schema())} WHERE {where}"
            for *fields, metric, value in self._rows(select, _COLUMNS, filters):
                of_record = metrics.setdefault(tuple(fields), {})
                if metric is not None:  # NULL in a record without any
                    of_record[metric] = math.nan if value is None else value  # SQLite keeps nan as NULL
        records = [DriftRecord(**dict(zip(_FIELDS, fields, strict=True)), metrics=of_record) for fields, of_record in metrics.items()]
        return sorted(records, key=lambda record: (record.step, record.mode, record.site, record.kind in CONTROLS, record.direction))

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """One state of the file for several reads: a resumed run may bring it to a newer schema at any time."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:  # SQLite has ended it by itself when it could not read
                self._db.execute("ROLLBACK")  # nothing was written

    def series(self, direction: str, site: str, mode: str = "probe") -> dict[str, list[Any]]:
        """Columns of one curve, by step: fields of `DriftRecord` and all metrics, None where there is no value."""
        records = self.records(direction=direction, site=site, mode=mode)
        fields = {name: [getattr(record, name) for record in records] for name in _FIELDS}
        names = sorted({*METRICS, *(name for record in records for name in record.metrics)})
        return fields | {name: [record.metrics.get(name) for record in records] for name in names}


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into typed ones."""
    try:
        yield
    except sqlite3.Error as error:
        raise _typed(error, path) from error
    except UnicodeDecodeError as error:  # in the text of the schema
        raise _damaged_inside(path, [str(error)]) from error


def check_files(path: Path) -> None:
    """Raises WrongKindError where a store, or a file that SQLite opens beside it, is a pipe or a device."""
    for file in (path, *(Path(f"{path}{ending}") for ending in ("-journal", "-wal", "-shm", ".lock"))):
        if file.exists():
            size_of(file)


def _typed(error: sqlite3.Error, path: Path) -> Exception:
    code = getattr(error, "sqlite_errorname", "")
    where = f"drift store '{path}'"
    if code == "SQLITE_FULL":
        return StorageFullError(
            f"no room for the records in {where}",
            expected="room for one more measurement",
            found=f"{shutil.disk_usage(path.parent).free} bytes free on the device",
            remedy="free some space and resume; every measurement before this one is in the file",
        )
    if code == "SQLITE_NOTADB" or code.startswith("SQLITE_CORRUPT") or "decode" in str(error):
        return DamagedFileError(f"{where} is damaged or no database", expected="a whole SQLite database", found=str(error), remedy=_DAMAGED)
    if code in ("SQLITE_BUSY", "SQLITE_LOCKED"):
        return StoreInUseError(
            f"{where} is held by another process",
            expected="a file that nobody else has locked",
            found=str(error),
            remedy="wait until that process is done, or read a copy",
        )
    if code.startswith("SQLITE_CONSTRAINT"):
        return ConfigError(
            f"{where} refuses the records",
            expected="new records of directions that are tracked",
            found=str(error),
            remedy="record every tracked direction once per step, and no other",
        )
    return FileError(
        f"{where} cannot be used",
        expected="a file that can be read and written",
        found=f"{code} {error}".strip(),
        remedy="check the path and its permissions",
    )


_DAMAGED = "restore it from a backup, or move it away and give the next run a new path"


def _no_store(path: Path) -> FileError:
    return FileError(
        f"there is no drift store at '{path}'",
        expected="the file of one",
        found="a folder" if path.is_dir() else "nothing there",
        remedy="give the path of the file that the training run wrote",
    )


def _damaged_inside(path: Path, findings: list[str]) -> DamagedFileError:
    return DamagedFileError(
        f"drift store '{path}' is damaged",
        expected="a database that passes SQLite's quick check",
        found="; ".join(findings),
        remedy=_DAMAGED,
    )


def _altered_tables(path: Path, names: list[str]) -> DamagedFileError:
    return DamagedFileError(
        f"the tables of drift store '{path}' were altered",
        expected="those that this library makes",
        found=f"others by the name of {', '.join(names)}, or none",
        remedy=_DAMAGED,
    )


def _wrong_value(path: Path, column: str, kind: Any, value: Any) -> DamagedFileError:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(word if isinstance(word, str) else word.__name__ for word in kinds)
    return DamagedFileError(
        f"drift store '{path}' holds a '{column}' that is none", expected=expected, found=repr(value)[:80], remedy=_DAMAGED
    )


def _wrong_kind(path: Path, application: int, version: int, is_empty: bool) -> FileError:
    return (DamagedFileError if is_empty else WrongKindError)(
        f"'{path}' is {'an empty file' if is_empty else 'no drift store of this version'}",
        expected=f"application {schema.APPLICATION:#x}, schema {' or '.join(map(str, schema.READABLE))}",
        found=f"application {application:#x}, schema {version}",
        remedy=_DAMAGED if is_empty else "give another path, or read it with the library version that wrote it",
    )
