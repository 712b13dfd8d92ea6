"""Stores that version 0.1.0 wrote, with a column per metric: they are read, and rewritten as a whole when a run resumes into them."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drift.test_store import MODEL, SITE, TRACKED, measurement, writer
from processes import ended, started

from steer.drift import schema
from steer.drift.records import DriftRecord
from steer.drift.store import DriftStore
from steer.drift.writer import DriftWriter
from steer.errors import ConfigError, StorageFullError, WrongModelError

DDL = """
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
    SELECT step, mode, direction, site, kind, n, mean, sd, change, effect_sd, effect_gap, p, q, z_controls, z_isotropic, z_covariance
    FROM records AS r
    WHERE NOT EXISTS (SELECT 1 FROM attempts AS later WHERE later.attempt > r.attempt AND later.from_step < r.step);
CREATE TRIGGER no_update_meta BEFORE UPDATE ON meta BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_delete_meta BEFORE DELETE ON meta BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_update_tracked BEFORE UPDATE ON tracked BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_delete_tracked BEFORE DELETE ON tracked BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_update_attempts BEFORE UPDATE ON attempts BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_delete_attempts BEFORE DELETE ON attempts BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_update_records BEFORE UPDATE ON records BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
CREATE TRIGGER no_delete_records BEFORE DELETE ON records BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;
INSERT INTO meta VALUES ('fingerprint', '{"embedding_digest": null, "model_type": "llama", "width": 4}');
INSERT INTO attempts VALUES (1, -1, '2026-01-01T00:00:00+00:00'), (2, 10, '2026-01-02T00:00:00+00:00');
PRAGMA application_id = 0x53544452;
PRAGMA user_version = 1;
"""
COLUMNS = ("mean", "sd", "change", "effect_sd", "effect_gap", "p", "q", "z_controls", "z_isotropic", "z_covariance")


def old_store(path: Path, steps: tuple[int, ...] = (0, 10, 20), later: tuple[int, ...] = (20, 30)) -> Path:
    """A run that recorded `steps`, and its second attempt after step 10, which recorded `later`; one named direction and one control."""
    db = sqlite3.connect(path)
    db.executescript(DDL)
    db.executemany("INSERT INTO tracked VALUES (?, ?, ?, ?, ?)", [(t.direction, t.site, t.kind, t.gap, t.sha256) for t in TRACKED])
    for attempt, recorded in ((1, steps), (2, later)):
        for record in (record for step in recorded for record in measurement(step, float(attempt))):
            row = (attempt, record.step, record.mode, record.direction, record.site, record.kind, record.n)
            values = [record.metrics.get(name) for name in COLUMNS]
            db.execute(f"INSERT INTO records VALUES ({', '.join('?' * (len(row) + len(values)))})", (*row, *values))
    db.commit()
    db.close()
    return path


CURRENT = [record for step, value in ((0, 1.0), (10, 1.0), (20, 2.0), (30, 2.0)) for record in measurement(step, value)]


def test_it_is_read_as_if_it_were_of_this_schema(tmp_path: Path) -> None:
    path = old_store(tmp_path / "d.sqlite")
    before = path.read_bytes()
    with DriftStore(path) as store:
        assert store.records() == CURRENT
        assert store.records(kind="named", site=SITE) == CURRENT[::2] and store.records(mode="stream") == []
        assert store.series("rude", SITE)["z_controls"] == [3.0] * 4
        assert store.series("random-00", SITE)["p"] == [None] * 4
        assert store.tracked() == TRACKED and store.fingerprint == MODEL and len(store.attempts()) == 2
    assert path.read_bytes() == before


def test_missing_values_differ_from_undefined_values(tmp_path: Path) -> None:
    path = old_store(tmp_path / "d.sqlite")
    db = sqlite3.connect(path)
    db.execute(
        "INSERT INTO records (attempt, step, mode, direction, site, kind, n) VALUES (2, 40, 'stream', 'rude', ?, 'named', 1)", (SITE,)
    )
    db.commit()
    db.close()

    def check(store: DriftStore) -> None:
        (record,) = store.records(mode="stream")
        assert sorted(record.metrics) == ["change", "effect_sd", "mean", "sd"] and all(map(math.isnan, record.metrics.values()))
        assert record.p is None

    with DriftStore(path) as store:
        check(store)
    with writer(path, from_step=40) as store:
        check(store)


def test_a_run_that_resumes_brings_it_to_this_schema_with_every_attempt(tmp_path: Path) -> None:
    path = old_store(tmp_path / "d.sqlite")
    reader = DriftStore(path)
    assert reader.records() == CURRENT
    with writer(path, from_step=20) as store:
        assert reader.records() == store.records() == CURRENT[:-2]  # step 30 of the second attempt is superseded
        store.append(measurement(30, 3.0))
        assert reader.records() == [*CURRENT[:-2], *measurement(30, 3.0)]
        with pytest.raises(ConfigError, match="UNIQUE"):
            store.append(measurement(30, 4.0))
    reader.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA,)
    assert raw.execute("SELECT count(*) FROM records").fetchone() == (2 * (3 + 2 + 1),)  # nothing was thrown away
    assert raw.execute("SELECT attempt, from_step FROM attempts").fetchall() == [(1, -1), (2, 10), (3, 20)]
    for change in ("UPDATE metrics SET value = 0", "DELETE FROM records", "DELETE FROM tracked"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute(change)
    raw.close()
    fresh = tmp_path / "fresh.sqlite"
    writer(fresh).close()
    shapes = [
        sorted(sqlite3.connect(file).execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall(), key=str)
        for file in (path, fresh)
    ]
    assert shapes[0] == shapes[1]


def test_a_resume_that_is_refused_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = old_store(tmp_path / "d.sqlite")
    before = path.read_bytes()
    with pytest.raises(WrongModelError):
        writer(path, fingerprint={**MODEL, "width": 8})
    with pytest.raises(ConfigError, match="another vector"):  # found out after the records were rewritten
        writer(path, tracked=[replace(TRACKED[0], sha256="0" * 64)])
    assert path.read_bytes() == before


def test_a_full_disk_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_store(tmp_path / "d.sqlite", steps=tuple(range(300)), later=())
    pages = path.stat().st_size // 4096
    migrate = schema.migrate

    def without_room(db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA max_page_count = {pages + 2}")
        migrate(db)

    monkeypatch.setattr(schema, "migrate", without_room)
    with pytest.raises(StorageFullError, match="no room"):
        writer(path, from_step=300)
    with DriftStore(path) as store:
        assert store.series("rude", SITE)["step"] == list(range(11))  # the old second attempt, which began after step 10, recorded nothing
        assert store._schema() == 1


def die_in_the_middle(path: Path) -> None:
    """Rewrites a store and dies before the commit; the size of the file is left beside it."""
    connect = sqlite3.connect

    def small_cache(*args: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.execute("PRAGMA cache_size = 10")  # so that much of the rewriting is in the file before the commit
        return db

    def die(self: DriftWriter, tracked: Any) -> None:
        path.with_name("size").write_text(str(path.stat().st_size))
        os.kill(os.getpid(), signal.SIGKILL)

    sqlite3.connect, DriftWriter._register = small_cache, die  # type: ignore[assignment, method-assign]
    writer(path, from_step=20)


def test_a_kill_in_the_middle_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = old_store(tmp_path / "d.sqlite", steps=tuple(range(500)), later=())
    with DriftStore(path) as store:
        before: list[DriftRecord] = store.records()
    size = path.stat().st_size
    assert ended([started(die_in_the_middle, path)]) == [-signal.SIGKILL]
    assert int((tmp_path / "size").read_text()) > size, "the rewriting had not reached the file"
    assert path.with_name("d.sqlite-journal").exists()
    with DriftStore(path) as store:
        assert store._schema() == 1 and store.records() == before
    with writer(path, from_step=10) as store:
        assert store._schema() == 2 and store.records() == before
