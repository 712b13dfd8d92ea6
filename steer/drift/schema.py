"""Tables of a drift store, and what becomes of a store of schema 1.

Schema 2 has one row of `records` per direction, site, mode and step, and one of `metrics` per value of it, so that a new metric changes no
table. Schema 1 had a column per metric; it is read as it is, and rewritten to schema 2 when a run resumes into it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cache
from typing import Any

SCHEMA = 2
READABLE = (1, 2)
APPLICATION = 0x53544452  # "STDR" in SQLite's header: tells a drift store from any other database

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tracked (
    direction TEXT, site TEXT, kind TEXT NOT NULL, gap REAL, sha256 TEXT NOT NULL, PRIMARY KEY (direction, site)
);
CREATE TABLE attempts (attempt INTEGER PRIMARY KEY, from_step INTEGER NOT NULL, started TEXT NOT NULL);
"""
_RECORDS = """
CREATE TABLE records (
    record INTEGER PRIMARY KEY,
    attempt INTEGER NOT NULL REFERENCES attempts,
    step INTEGER NOT NULL, mode TEXT NOT NULL, direction TEXT NOT NULL, site TEXT NOT NULL, n INTEGER NOT NULL,
    UNIQUE (attempt, step, mode, direction, site),
    FOREIGN KEY (direction, site) REFERENCES tracked
);
CREATE TABLE metrics (
    record INTEGER NOT NULL REFERENCES records, metric TEXT NOT NULL, value REAL, PRIMARY KEY (record, metric)
) WITHOUT ROWID;
CREATE VIEW current AS
    SELECT r.step, r.mode, r.direction, r.site, t.kind, r.n, m.metric, m.value
    FROM records AS r JOIN tracked AS t USING (direction, site) LEFT JOIN metrics AS m USING (record)
    WHERE NOT EXISTS (SELECT 1 FROM attempts AS later WHERE later.attempt > r.attempt AND later.from_step < r.step);
"""

_TABLES_1 = """
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
"""

# Schema 1: metrics in columns. NULL stood for nan in the first of them, for a value that the mode or kind does not have in the others.
_ALWAYS = ("mean", "sd", "change", "effect_sd")
_OPTIONAL = ("effect_gap", "p", "q", "z_controls", "z_isotropic", "z_covariance")
_METRICS = (*_ALWAYS, *_OPTIONAL)
_KEY = "attempt, step, mode, direction, site"

_SET_ASIDE_1 = """
DROP VIEW current;
DROP TRIGGER no_update_records;
DROP TRIGGER no_delete_records;
ALTER TABLE records RENAME TO records_1;
"""


def create(db: sqlite3.Connection, fingerprint: Mapping[str, Any]) -> None:
    """Makes the tables in an empty file, within a transaction of the caller's."""
    _execute(db, _TABLES + _RECORDS + _append_only("meta", "tracked", "attempts", "records", "metrics"))
    db.execute("INSERT INTO meta VALUES ('fingerprint', ?)", (json.dumps(dict(fingerprint), sort_keys=True),))
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")


def migrate(db: sqlite3.Connection) -> None:
    """Rewrites the records of schema 1 as those of schema 2, of all attempts, within a transaction of the caller's."""
    _execute(db, _SET_ASIDE_1 + _RECORDS)
    db.execute(f"INSERT INTO records ({_KEY}, n) SELECT {_KEY}, n FROM records_1 ORDER BY {_KEY}")
    joined = f"records_1 JOIN records USING ({_KEY})"
    for metric in _METRICS:
        db.execute(f"INSERT INTO metrics SELECT record, '{metric}', {metric} FROM {joined} WHERE {_has(metric)}")
    _execute(db, "DROP TABLE records_1;\n" + _append_only("records", "metrics"))
    db.execute(f"PRAGMA user_version = {SCHEMA}")


def altered(db: sqlite3.Connection, schema: int) -> list[str]:
    """Names of the tables and views that are not as this library makes them: a view of the same name may say anything, without end."""
    found = _definitions(db)
    return [name for name, definition in _expected(schema).items() if found.get(name) != definition]


@cache
def _expected(schema: int) -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as db:
        _execute(db, _TABLES + (_RECORDS if schema == SCHEMA else _TABLES_1))
        return _definitions(db)


def _definitions(db: sqlite3.Connection) -> dict[str, str]:
    """What each table and view was made with, by its name."""
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view')")
    return {name: " ".join(str(sql).split()) for name, sql in rows}


def current(schema: int) -> str:
    """What to select the columns of the view `current` from: step, mode, direction, site, kind, n, metric, value."""
    if schema == SCHEMA:
        return "current"
    select = "SELECT step, mode, direction, site, kind, n, '{0}' AS metric, {0} AS value FROM current WHERE {1}"
    return f"({' UNION ALL '.join(select.format(metric, _has(metric)) for metric in _METRICS)})"


def _has(metric: str) -> str:
    return f"{metric} IS NOT NULL" if metric in _OPTIONAL else "1"


def _append_only(*tables: str) -> str:
    trigger = "CREATE TRIGGER no_{}_{} BEFORE {} ON {} BEGIN SELECT RAISE(ABORT, 'a drift store is append-only'); END;\n"
    return "".join(trigger.format(verb.lower(), table, verb, table) for table in tables for verb in ("UPDATE", "DELETE"))


def _execute(db: sqlite3.Connection, script: str) -> None:
    for statement in _statements(script):
        db.execute(statement)


def _statements(script: str) -> Iterator[str]:
    """Single statements of a script (`executescript` would commit the transaction they belong to)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
