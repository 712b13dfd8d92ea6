"""Drift store: the records of one training run in one SQLite file that is only ever added to.

Why SQLite: it comes with Python, is one file, can be read while training writes, and one measurement (all directions of a step) is one
transaction, there as a whole or not at all. Why a rollback journal and not WAL: the file at rest is complete by itself, so it can be
copied, and it works on network file systems, where WAL does not. `synchronous=EXTRA` makes a commit survive a power cut, which matters
because a checkpoint that is written next relies on the records before it; a commit costs milliseconds, once per check.

Why attempts: a run that is killed has recorded steps that its last checkpoint knows nothing of. Resuming opens a new attempt that says from
which step it goes on, and the view `current` hides what earlier attempts recorded after that step. Nothing is updated or deleted (triggers
refuse it), so what the dead attempt saw stays in `records`.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from steer.drift.records import KINDS, MODES, DriftRecord, Tracked
from steer.errors import ConfigError, DamagedFileError, FileError, StorageFullError, WrongKindError, WrongModelError

SCHEMA = 1
APPLICATION = 0x53544452  # "STDR" in SQLite's header: tells a drift store from any other database

COLUMNS = tuple(field.name for field in fields(DriftRecord))
_OPTIONAL = {field.name for field in fields(DriftRecord) if field.default is None}

_TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tracked (
    direction TEXT, site TEXT, kind TEXT NOT NULL, gap REAL, sha256 TEXT NOT NULL, PRIMARY KEY (direction, site)
);
CREATE TABLE attempts (attempt INTEGER PRIMARY KEY, from_step INTEGER NOT NULL, started TEXT NOT NULL);
CREATE TABLE records (
    attempt INTEGER NOT NULL REFERENCES attempts,
    step INTEGER NOT NULL, mode TEXT NOT NULL, direction TEXT NOT NULL, site TEXT NOT NULL, kind TEXT NOT NULL, n INTEGER NOT NULL,
    mean REAL, sd REAL, change REAL, effect_sd REAL, effect_gap REAL, p REAL, q REAL, z_controls REAL, z_isotropic REAL, z_covariance REAL,
    PRIMARY KEY (attempt, step, mode, direction, site),
    FOREIGN KEY (direction, site) REFERENCES tracked
) WITHOUT ROWID;
CREATE VIEW current AS
    SELECT {", ".join(COLUMNS)} FROM records AS r
    WHERE NOT EXISTS (SELECT 1 FROM attempts AS later WHERE later.attempt > r.attempt AND later.from_step < r.step);
""" + "".join(
    f"CREATE TRIGGER no_{verb.lower()}_{table} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;\n"
    for table in ("meta", "tracked", "attempts", "records")
    for verb in ("UPDATE", "DELETE")
)


class StoreInUseError(FileError):
    """Another process writes to this drift store."""


class DriftStore:
    """Reads a store, also while a training run writes to it.

    Args:
        path: an existing file.

    Raises:
        FileError: there is no such file. DamagedFileError: it is no database, or a damaged one. WrongKindError: another database, or a
        store of another schema.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileError(
                f"there is no drift store at '{self.path}'",
                expected="the file of one",
                found="a folder" if self.path.is_dir() else "nothing there",
                remedy="give the path of the file that the training run wrote",
            )
        self._db = self._connect()
        try:
            with self._errors():
                self._check_kind()
                self._db.execute("PRAGMA query_only = 1")
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        with self._errors():  # read-write even to read: what a killed writer left half-done is rolled back by whoever opens the file next
            return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=30, isolation_level=None)

    def _check_kind(self) -> None:
        findings = [row[0] for row in self._db.execute("PRAGMA quick_check(3)")]
        if findings != ["ok"]:
            whole = "a database that passes SQLite's quick check"
            raise DamagedFileError(f"drift store '{self.path}' is damaged", expected=whole, found="; ".join(findings), remedy=_DAMAGED)
        application, schema = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if application != APPLICATION or schema != SCHEMA:
            empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            raise (DamagedFileError if empty else WrongKindError)(
                f"'{self.path}' is {'an empty file' if empty else 'no drift store of this version'}",
                expected=f"application {APPLICATION:#x}, schema {SCHEMA}",
                found=f"application {application:#x}, schema {schema}",
                remedy=_DAMAGED if empty else "give another path, or read it with the library version that wrote it",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns SQLite's errors into typed ones."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            where = f"drift store '{self.path}'"
            if code == "SQLITE_FULL":
                free = shutil.disk_usage(self.path.parent).free
                raise StorageFullError(
                    f"no room for the records in {where}",
                    expected="room for one more measurement",
                    found=f"{free} bytes free on the device",
                    remedy="free some space and resume; every measurement before this one is in the file",
                ) from error
            if code == "SQLITE_NOTADB" or code.startswith("SQLITE_CORRUPT"):
                wanted = "a whole SQLite database"
                raise DamagedFileError(f"{where} is damaged or no database", expected=wanted, found=str(error), remedy=_DAMAGED) from error
            if code in ("SQLITE_BUSY", "SQLITE_LOCKED"):
                wanted, remedy = "a file that nobody else has locked", "wait until that process is done, or read a copy"
                raise StoreInUseError(f"{where} is held by another process", expected=wanted, found=str(error), remedy=remedy) from error
            if code.startswith("SQLITE_CONSTRAINT"):
                wanted = "new records of directions that are tracked"
                remedy = "record every tracked direction once per step, and no other"
                raise ConfigError(f"{where} refuses the records", expected=wanted, found=str(error), remedy=remedy) from error
            wanted, remedy = "a file that can be read and written", "check the path and its permissions"
            raise FileError(f"{where} cannot be used", expected=wanted, found=f"{code} {error}".strip(), remedy=remedy) from error

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- reading

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the model the records are about."""
        with self._errors():
            return json.loads(self._db.execute("SELECT value FROM meta WHERE key = 'fingerprint'").fetchone()[0])

    def tracked(self) -> list[Tracked]:
        """Every direction at every site, in the order in which they were first tracked."""
        with self._errors():
            return [Tracked(*row) for row in self._db.execute("SELECT direction, site, kind, gap, sha256 FROM tracked ORDER BY rowid")]

    def attempts(self) -> list[dict[str, Any]]:
        """attempt, from_step (-1 for a start from scratch), started (ISO time)."""
        with self._errors():
            rows = self._db.execute("SELECT attempt, from_step, started FROM attempts ORDER BY attempt").fetchall()
        return [dict(zip(("attempt", "from_step", "started"), row, strict=True)) for row in rows]

    def records(
        self, *, direction: str | None = None, site: str | None = None, mode: str | None = None, kind: str | None = None
    ) -> list[DriftRecord]:
        """Records that no later attempt has superseded, by step; the arguments filter."""
        wanted = {"direction": direction, "site": site, "mode": mode, "kind": kind}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "1"
        with self._errors():
            rows = self._db.execute(
                f"SELECT {', '.join(COLUMNS)} FROM current WHERE {where} ORDER BY step, mode, site, kind DESC, direction", given
            ).fetchall()
        return [DriftRecord(*(_read(name, value) for name, value in zip(COLUMNS, row, strict=True))) for row in rows]

    def series(self, direction: str, site: str, mode: str = "probe") -> dict[str, list[Any]]:
        """Columns of one curve, by step: every attribute of `DriftRecord` with the list of its values."""
        rows = [asdict(record) for record in self.records(direction=direction, site=site, mode=mode)]
        return {name: [row[name] for row in rows] for name in COLUMNS}


_DAMAGED = "restore it from a backup, or move it away and give the next run a new path"


def _read(name: str, value: Any) -> Any:
    return math.nan if value is None and name not in _OPTIONAL else value  # SQLite keeps nan as NULL


class DriftWriter(DriftStore):
    """Writes a store; makes it when it is missing. One process at a time (under DDP the main rank only), held until `close` or death.

    Args:
        path: the file; its folder is made. A lock file, always empty, lies beside it.
        fingerprint: of the model, JSON-able.
        tracked: every direction that will be recorded.
        from_step: the last recorded step that the checkpoint being resumed knows of; later records of earlier attempts are superseded. -1
            starts from scratch and supersedes them all.

    Raises:
        StoreInUseError: another process writes to it. WrongModelError: its records are about another model. ConfigError: a tracked
        direction has another vector than before. DamagedFileError, WrongKindError, StorageFullError.
    """

    def __init__(self, path: str | Path, *, fingerprint: Mapping[str, Any], tracked: Sequence[Tracked], from_step: int = -1) -> None:
        self.path = Path(path)
        self.from_step = from_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold()
        self._db = self._lock
        try:
            with self._errors():
                self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._db.execute("PRAGMA synchronous = EXTRA")
                self._db.execute("PRAGMA foreign_keys = 1")
                with self._transaction():
                    if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                        self._create(fingerprint)
                    self._check_kind()
                    self._check_model(fingerprint)
                    self._register(tracked)
                    self.attempt = self._db.execute(
                        "INSERT INTO attempts (from_step, started) VALUES (?, ?)",
                        (from_step, datetime.now(UTC).isoformat(timespec="seconds")),
                    ).lastrowid
        except BaseException:
            self.close()
            raise

    def _hold(self) -> sqlite3.Connection:
        """The writer's lock: an exclusive lock on a database beside the store, whose own locks must stay free for readers.

        The operating system drops it when the process dies, however it dies, and forked data-loader workers do not inherit it.
        """
        with self._errors():
            lock = sqlite3.connect(f"{self.path}.lock", timeout=0, isolation_level=None)
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                lock.close()
                if error.sqlite_errorname != "SQLITE_BUSY":
                    raise
                raise StoreInUseError(
                    f"drift store '{self.path}' already has a writer",
                    expected="one writing process, the main rank",
                    found=f"another one that holds {self.path}.lock",
                    remedy="give every run its own store, and read with DriftStore",
                ) from error
        return lock

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has rolled back by itself when the disk is full
                self._db.execute("ROLLBACK")
            raise

    def _create(self, fingerprint: Mapping[str, Any]) -> None:
        for statement in _statements(_TABLES):
            self._db.execute(statement)
        self._db.execute("INSERT INTO meta VALUES ('fingerprint', ?)", (json.dumps(dict(fingerprint), sort_keys=True),))
        self._db.execute(f"PRAGMA application_id = {APPLICATION}")
        self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _check_model(self, fingerprint: Mapping[str, Any]) -> None:
        known, given = self.fingerprint, json.loads(json.dumps(dict(fingerprint)))
        if differing := sorted(key for key in known.keys() | given.keys() if known.get(key) != given.get(key)):
            raise WrongModelError(
                f"drift store '{self.path}' holds records of another model",
                expected={key: known.get(key) for key in differing},
                found={key: given.get(key) for key in differing},
                remedy="give this run a store of its own",
            )

    def _register(self, tracked: Iterable[Tracked]) -> None:
        known = {(one.direction, one.site): one for one in self.tracked()}
        for one in tracked:
            before = known.setdefault((one.direction, one.site), one)
            if before is one:
                self._db.execute("INSERT INTO tracked VALUES (?, ?, ?, ?, ?)", astuple(one))
            elif before.sha256 != one.sha256:
                raise ConfigError(
                    f"drift store '{self.path}' knows another vector as '{one.direction}' at '{one.site}'",
                    expected=f"sha256 {before.sha256[:16]}",
                    found=f"sha256 {one.sha256[:16]}",
                    remedy="give the direction another name, or the run a new store",
                )

    def append(self, records: Sequence[DriftRecord]) -> None:
        """Adds one measurement, all of it or nothing; on disk when this returns.

        Raises:
            ConfigError: a step that this attempt resumed after, a record twice, an unknown mode or kind, a direction that is not tracked.
            StorageFullError: nothing of the measurement is kept, everything before it is.
        """
        for record in records:
            if record.step <= self.from_step:
                raise ConfigError(
                    f"step {record.step} is already covered",
                    expected=f"a step after {self.from_step}, where this attempt began",
                    found=f"step {record.step}",
                    remedy=f"measure from step {self.from_step + 1} on",
                )
            if record.mode not in MODES or record.kind not in KINDS:
                raise ConfigError(
                    "unknown mode or kind of a record",
                    expected=f"mode {' or '.join(MODES)}, kind {' or '.join(KINDS)}",
                    found=f"mode {record.mode}, kind {record.kind}",
                    remedy="make the record with one of these",
                )
        insert = f"INSERT INTO records (attempt, {', '.join(COLUMNS)}) VALUES (?{', ?' * len(COLUMNS)})"
        with self._errors(), self._transaction():
            self._db.executemany(insert, [(self.attempt, *astuple(record)) for record in records])

    def close(self) -> None:
        """Releases the store to another writer."""
        self._db.close()
        self._lock.close()


def _statements(script: str) -> Iterator[str]:
    """Single statements of a script (`executescript` would commit the transaction they belong to)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
