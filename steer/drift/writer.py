"""Writer of a drift store: one process, whole measurements, a new attempt for each start of the run. See `steer.drift.store`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steer.drift import schema
from steer.drift.measurement import MODES
from steer.drift.records import DriftRecord
from steer.drift.site_directions import KINDS, TrackedDirection
from steer.drift.store import DriftStore, StoreInUseError, check_files, typed_errors
from steer.errors import ConfigError, WrongModelError
from steer.model.fingerprint import CASTS
from steer.reading import place_of


class DriftWriter(DriftStore):
    """Writes a store; makes it when it is missing, and brings one of schema 1 to this schema.

    One process at a time (under DDP the main rank only), held until `close` or death.

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

    def __init__(
        self, path: str | Path, *, fingerprint: Mapping[str, Any], tracked: Sequence[TrackedDirection], from_step: int = -1
    ) -> None:
        self.path = place_of(path)
        self.from_step = from_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_files(self.path)
        self._lock = _hold(self.path)
        self._db = self._lock
        try:
            with typed_errors(self.path):
                self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._db.execute("PRAGMA synchronous = EXTRA")
                self._db.execute("PRAGMA foreign_keys = 1")
                with self._transaction():
                    if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                        schema.create(self._db, fingerprint)
                    self._check_kind()
                    self._check_model(fingerprint)
                    if self._schema() < schema.SCHEMA:
                        schema.migrate(self._db)
                    self._register(tracked)
                    started = datetime.now(UTC).isoformat(timespec="seconds")
                    insert = "INSERT INTO attempts (from_step, started) VALUES (?, ?)"
                    self.attempt = self._db.execute(insert, (from_step, started)).lastrowid
        except BaseException:
            self.close()
            raise

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

    def _check_model(self, fingerprint: Mapping[str, Any]) -> None:
        known = self.fingerprint
        own = json.loads(json.dumps(dict(fingerprint)))
        names = (known.keys() | own.keys()) - {CASTS}  # follow from the digest, and older stores do not have them
        if differing := sorted(key for key in names if known.get(key) != own.get(key)):
            raise _another_model(self.path, {key: known.get(key) for key in differing}, {key: own.get(key) for key in differing})

    def _register(self, tracked: Iterable[TrackedDirection]) -> None:
        known = {(direction.direction, direction.site): direction for direction in self.tracked()}
        for direction in tracked:
            before = known.setdefault((direction.direction, direction.site), direction)
            if before is direction:
                self._db.execute("INSERT INTO tracked VALUES (?, ?, ?, ?, ?)", astuple(direction))
            elif before.sha256 != direction.sha256:
                raise _another_vector(self.path, before, direction)

    def append(self, records: Sequence[DriftRecord]) -> None:
        """Adds one measurement, all of it or nothing; on disk when this returns.

        Raises:
            ConfigError: a step that this attempt resumed after, a record twice, an unknown mode or kind, a direction that is not tracked.
            StorageFullError: nothing of the measurement is kept, everything before it is.
        """
        for record in records:
            if record.step <= self.from_step:
                raise _already_covered(record.step, self.from_step)
            if record.mode not in MODES or record.kind not in KINDS:
                raise _unknown_mode_or_kind(record)
        with typed_errors(self.path), self._transaction():
            first = self._db.execute("SELECT coalesce(max(record), 0) + 1 FROM records").fetchone()[0]
            numbered = list(enumerate(records, first))
            rows = [(number, self.attempt, own.step, own.mode, own.direction, own.site, own.n) for number, own in numbered]
            values = [(number, metric, value) for number, own in numbered for metric, value in own.metrics.items()]
            self._db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.executemany("INSERT INTO metrics VALUES (?, ?, ?)", values)

    def close(self) -> None:
        """Releases the store to another writer."""
        self._db.close()
        self._lock.close()


def _hold(path: Path) -> sqlite3.Connection:
    """Takes the writer's lock: an exclusive lock on a database beside the store, whose own locks must stay free for readers.

    The operating system drops it when the process dies, however it dies, and forked data-loader workers do not inherit it.
    """
    with typed_errors(path):
        lock = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            if error.sqlite_errorname != "SQLITE_BUSY":
                raise
            raise _has_a_writer(path) from error
    return lock


def _has_a_writer(path: Path) -> StoreInUseError:
    return StoreInUseError(
        f"drift store '{path}' already has a writer",
        expected="one writing process, the main rank",
        found=f"another one that holds {path}.lock",
        remedy="give every run its own store, and read with DriftStore",
    )


def _another_model(path: Path, known: Mapping[str, Any], own: Mapping[str, Any]) -> WrongModelError:
    remedy = "give this run a store of its own"
    return WrongModelError(f"drift store '{path}' holds records of another model", expected=known, found=own, remedy=remedy)


def _another_vector(path: Path, before: TrackedDirection, now: TrackedDirection) -> ConfigError:
    return ConfigError(
        f"drift store '{path}' knows another vector as '{now.direction}' at '{now.site}'",
        expected=f"sha256 {before.sha256[:16]}",
        found=f"sha256 {now.sha256[:16]}",
        remedy="give the direction another name, or the run a new store",
    )


def _already_covered(step: int, from_step: int) -> ConfigError:
    return ConfigError(
        f"step {step} is already covered",
        expected=f"a step after {from_step}, where this attempt began",
        found=f"step {step}",
        remedy=f"measure from step {from_step + 1} on",
    )


def _unknown_mode_or_kind(record: DriftRecord) -> ConfigError:
    return ConfigError(
        "unknown mode or kind of a record",
        expected=f"mode {' or '.join(MODES)}, kind {' or '.join(KINDS)}",
        found=f"mode {record.mode}, kind {record.kind}",
        remedy="make the record with one of these",
    )
