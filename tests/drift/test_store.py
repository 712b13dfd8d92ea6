"""The store: append-only, whole measurements, one writer, exact after a kill and a resume."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ended, started

from steer.drift.records import DriftRecord
from steer.drift.site_directions import TrackedDirection
from steer.drift.store import DriftStore, StoreInUseError
from steer.drift.writer import DriftWriter
from steer.errors import ConfigError, DamagedFileError, FileError, StorageFullError, WrongKindError, WrongModelError

MODEL = {"model_type": "llama", "width": 4, "embedding_digest": None}
SITE = "layers.1.output"
TRACKED = [
    TrackedDirection.of("rude", SITE, "named", 2.5, torch.tensor([1.0, 0, 0, 0])),
    TrackedDirection.of("random-00", SITE, "control", None, torch.tensor([0, 1.0, 0, 0])),
]


def measurement(step: int, value: float = 0.5) -> list[DriftRecord]:
    shift = {"mean": value, "sd": 1.0, "change": value, "effect_sd": value, "effect_gap": value / 2.5}
    tests = {"p": 0.01, "q": 0.02, "z_controls": 3.0, "z_isotropic": 2.0, "z_covariance": 1.0}
    named = DriftRecord(step, "probe", "rude", SITE, "named", 8, shift | tests)
    control = {"mean": 0.1, "sd": 1.0, "change": 0.1, "effect_sd": 0.1}
    return [named, DriftRecord(step, "probe", "random-00", SITE, "control", 8, control)]


def writer(path: Path, from_step: int = -1, **changes: object) -> DriftWriter:
    return DriftWriter(path, **{"fingerprint": MODEL, "tracked": TRACKED, "from_step": from_step, **changes})  # type: ignore[arg-type]


def test_records_come_back_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "new" / "drift.sqlite"
    with writer(path) as store:
        for step in (20, 0, 10):
            store.append(measurement(step, step / 7))
    with DriftStore(path) as store:
        assert store.records(kind="named") == [measurement(step, step / 7)[0] for step in (0, 10, 20)]
        assert store.records() == [record for step in (0, 10, 20) for record in measurement(step, step / 7)]
        assert store.series("rude", SITE)["effect_sd"] == [0.0, 10 / 7, 20 / 7]
        assert store.series("random-00", SITE)["p"] == [None, None, None]
        assert store.records(mode="stream") == []
        assert store.fingerprint == MODEL
        assert store.tracked() == TRACKED
        assert [(row["attempt"], row["from_step"]) for row in store.attempts()] == [(1, -1)]


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    odd = replace(measurement(0)[0], metrics={"mean": math.nan, "sd": math.inf})
    with writer(tmp_path / "d.sqlite") as store:
        store.append([odd])
        back = store.records()[0]
    assert math.isnan(back.mean) and back.sd == math.inf and back.p is None


def test_a_measurement_is_kept_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with writer(tmp_path / "d.sqlite") as store:
        store.append(measurement(0))
        with pytest.raises(ConfigError, match="UNIQUE"):
            store.append(measurement(10) + measurement(0))
        with pytest.raises(ConfigError, match="FOREIGN KEY"):
            store.append([*measurement(10), replace(measurement(10)[0], direction="unheard of")])
        assert {record.step for record in store.records()} == {0}
        store.append(measurement(10))
        assert {record.step for record in store.records()} == {0, 10}


def test_a_resume_supersedes_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    with writer(path) as store:
        for step in (0, 10, 20, 30):
            store.append(measurement(step, 1.0))
    with writer(path, from_step=10) as store:
        assert [record.step for record in store.records(kind="named")] == [0, 10]
        for step in (20, 30, 40):
            store.append(measurement(step, 2.0))
        with pytest.raises(ConfigError, match="step 10 is already covered"):
            store.append(measurement(10))
        series = store.series("rude", SITE)
    assert series["step"] == [0, 10, 20, 30, 40]
    assert series["change"] == [1.0, 1.0, 2.0, 2.0, 2.0]
    raw = sqlite3.connect(path)
    assert raw.execute("SELECT count(*) FROM records").fetchone() == (2 * 7,)  # nothing was thrown away


def test_a_start_from_scratch_supersedes_everything(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    with writer(path) as store:
        store.append(measurement(0, 1.0))
        store.append(measurement(10, 1.0))
    with writer(path) as store:
        store.append(measurement(0, 2.0))
        assert store.series("rude", SITE)["change"] == [2.0]


@settings(max_examples=25, deadline=None)
@given(lives=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_any_sequence_of_deaths_leaves_one_record_per_step(tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int]]) -> None:
    """Each life resumes from a checkpoint that is some checks old and records some more; the curve must be what a single life gives."""
    path = tmp_path_factory.mktemp("store") / "d.sqlite"
    done = -1
    for life, (back, more) in enumerate(lives):
        start = max(done - back, -1)
        with writer(path, from_step=start) as store:
            for step in range(start + 1, start + 1 + more):
                store.append(measurement(step, float(life)))
        done = start + more
    with DriftStore(path) as store:
        assert store.series("rude", SITE)["step"] == list(range(done + 1))


def append_and_tell(path: Path, start: int, tell: int) -> None:
    """Writes each step to a pipe when it is in the store."""
    store = writer(path, from_step=start)
    for step in range(start + 1, 100000):
        store.append(measurement(step))
        os.write(tell, f"{step}\n".encode())


def test_kill_9_while_writing_then_resume(tmp_path: Path) -> None:
    """A real kill in the middle of writing, twice: nothing committed is lost, nothing half-written shows, the lock is free again."""
    path, start, committed = tmp_path / "d.sqlite", -1, -1
    for kills in (3, 7):
        read, tell = os.pipe()
        child = started(append_and_tell, path, start, tell)
        os.close(tell)
        with os.fdopen(read) as told:
            for line in told:
                committed = int(line)
                if committed >= start + kills:
                    break
            with pytest.raises(StoreInUseError, match="already has a writer"):
                writer(path)
            child.kill()
            committed = int(([committed, *map(int, told.read().split())])[-1])
        assert ended([child]) == [-signal.SIGKILL]
        with DriftStore(path) as store:
            steps = store.series("rude", SITE)["step"]
            assert steps == store.series("random-00", SITE)["step"]
            assert len(steps) in (committed + 1, committed + 2)  # the last commit may have come before its line
            assert steps == list(range(len(steps)))
        start = committed - 2  # the checkpoint is two checks old
    with writer(path, from_step=start) as store:
        for step in range(start + 1, committed + 3):
            store.append(measurement(step, 9.0))
        series = store.series("rude", SITE)
    assert series["step"] == list(range(committed + 3))
    assert series["change"][start + 1 :] == [9.0] * (committed + 2 - start)
    assert 9.0 not in series["change"][: start + 1]


def test_reading_while_training_writes(tmp_path: Path) -> None:
    with writer(tmp_path / "d.sqlite") as store, DriftStore(tmp_path / "d.sqlite") as reader:
        for step in range(3):
            store.append(measurement(step))
            assert [record.step for record in reader.records(kind="named")] == list(range(step + 1))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    with writer(path) as store:
        store.append(measurement(0))
        with pytest.raises(StoreInUseError) as error:
            writer(path)
        assert error.value.remedy is not None
        store.append(measurement(1))
    with writer(path, from_step=1) as store:
        assert len(store.records()) == 4


CHANGES = [
    "UPDATE metrics SET value = 0",
    "DELETE FROM metrics",
    "UPDATE records SET n = 0",
    "DELETE FROM records",
    "DELETE FROM attempts",
    "UPDATE meta SET value = ''",
]


@pytest.mark.parametrize("statement", CHANGES)
def test_the_file_itself_refuses_changes(tmp_path: Path, statement: str) -> None:
    with writer(tmp_path / "d.sqlite") as store:
        store.append(measurement(0))
    raw = sqlite3.connect(tmp_path / "d.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(statement)


def test_another_model_is_refused(tmp_path: Path) -> None:
    writer(tmp_path / "d.sqlite").close()
    with pytest.raises(WrongModelError) as error:
        writer(tmp_path / "d.sqlite", fingerprint={**MODEL, "width": 8})
    assert error.value.expected == {"width": 4} and error.value.found == {"width": 8}
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert len(store.attempts()) == 1  # the refused one left no trace


def test_another_vector_under_the_same_name_is_refused(tmp_path: Path) -> None:
    writer(tmp_path / "d.sqlite").close()
    another_vector = TrackedDirection.of("rude", SITE, "named", 2.5, torch.tensor([0.0, 0, 1, 0]))
    with pytest.raises(ConfigError, match="another vector as 'rude' at 'layers.1.output'"):
        writer(tmp_path / "d.sqlite", tracked=[another_vector])
    with writer(tmp_path / "d.sqlite", tracked=[TrackedDirection.of("new", SITE, "named", 1.0, torch.ones(4))], from_step=5) as store:
        assert [known.direction for known in store.tracked()] == ["rude", "random-00", "new"]


@pytest.mark.parametrize("opens", [DriftStore, writer])
def test_bytes_that_are_no_database(tmp_path: Path, opens: type) -> None:
    (tmp_path / "d.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(DamagedFileError, match="d.sqlite"):
        opens(tmp_path / "d.sqlite")


@pytest.mark.parametrize("opens", [DriftStore, lambda path: writer(path, from_step=400)])
@pytest.mark.parametrize("damage", ["truncate", "overwrite"])
def test_a_damaged_store(tmp_path: Path, opens: type, damage: str) -> None:
    path = tmp_path / "d.sqlite"
    with writer(path) as store:
        for step in range(50):
            store.append(measurement(step))
    data = path.read_bytes()
    assert len(data) > 3 * 4096
    path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:4096] + os.urandom(len(data) - 4096))
    with pytest.raises(DamagedFileError) as error:
        opens(path)
    assert error.value.remedy is not None


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no drift store at"):
        DriftStore(tmp_path / "missing.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(DamagedFileError, match="empty file"):
        DriftStore(tmp_path / "empty.sqlite")
    database = sqlite3.connect(tmp_path / "other.sqlite")
    database.execute("CREATE TABLE t (x)")
    database.close()
    for opens in (DriftStore, writer):
        with pytest.raises(WrongKindError):
            opens(tmp_path / "other.sqlite")


def test_a_full_disk_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    store = writer(path)
    store.append(measurement(0))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFullError, match="no room") as error:
        for step in range(1, 1000):
            store.append(measurement(step))
    assert isinstance(error.value, OSError)
    recorded = store.series("rude", SITE)["step"]
    assert recorded == list(range(len(recorded))) == store.series("random-00", SITE)["step"]
    store._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    store.append(measurement(len(recorded)))  # goes on once there is room
    assert store.series("rude", SITE)["step"] == [*recorded, len(recorded)]
    store.close()


def fill(path: Path) -> None:
    """Writes until the system refuses, and leaves beside the store what came of it."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    store = writer(path)
    for step in range(10000):
        try:
            store.append(measurement(step))
        except FileError as error:
            path.with_name("said").write_text(f"{type(error).__name__} {step}")
            return


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_a_limit_of_the_operating_system_gives_a_typed_error(tmp_path: Path) -> None:
    """A real failing write: the process may not make files larger than 64 KiB."""
    assert ended([started(fill, tmp_path / "d.sqlite")]) == [0]
    out = (tmp_path / "said").read_text().split()
    assert out[0] in ("StorageFullError", "FileError")
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert store.series("rude", SITE)["step"] == list(range(int(out[1])))


def test_unknown_modes_and_steps_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "d.sqlite") as store, pytest.raises(ConfigError, match="mode or kind"):
        store.append([replace(measurement(0)[0], mode="dream")])
    with writer(tmp_path / "d.sqlite") as store, pytest.raises(ConfigError, match="already covered"):
        store.append(measurement(-1))


# ---- what others have written into the file


def altered(path: Path, *statements: str) -> Path:
    """A store that another program has written to, with the triggers that forbid it taken away."""
    with writer(path) as store:
        store.append(measurement(0))
    with closing(sqlite3.connect(path)) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            db.execute(statement)
        db.commit()
    return path


ENDLESS = "CREATE VIEW {0} AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT {1} FROM c"
CURRENT = "x AS step, x AS mode, x AS direction, x AS site, x AS kind, x AS n, x AS metric, x AS value"


@pytest.mark.parametrize(
    "statements",
    [
        ("DROP VIEW current", ENDLESS.format("current", CURRENT)),
        ("DROP TABLE attempts", ENDLESS.format("attempts", "x AS attempt, 0 AS from_step, 'now' AS started")),
        ("ALTER TABLE tracked RENAME COLUMN gap TO gaps",),
        ("UPDATE meta SET value = '[['",),
        ("UPDATE meta SET value = '[]'",),
        ("UPDATE meta SET value = x'00ff'",),
        ("DELETE FROM meta",),
        ("UPDATE records SET step = 'ten'",),
        ("UPDATE records SET n = 1.5",),
        ("UPDATE records SET mode = 'prove'",),
        ("UPDATE metrics SET value = 'high' WHERE metric = 'mean'",),
        ("UPDATE metrics SET value = x'00' WHERE metric = 'mean'",),
        ("UPDATE tracked SET gap = 'wide'",),
        ("UPDATE tracked SET kind = 'wild'",),
        ("UPDATE tracked SET sha256 = CAST(x'c328' AS TEXT)",),
        ("UPDATE attempts SET from_step = 'begin'",),
        ("UPDATE attempts SET started = x'00'",),
    ],
)
def test_values_and_tables_that_are_none_of_a_store(tmp_path: Path, statements: tuple[str, ...]) -> None:
    path = altered(tmp_path / "d.sqlite", *statements)
    with pytest.raises(DamagedFileError) as caught, DriftStore(path) as store:
        _ = store.fingerprint, store.tracked(), store.attempts(), store.records()
    assert str(path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("ending", ["", "-journal", ".lock"])
def test_pipes_in_the_place_of_its_files_are_refused_at_once(tmp_path: Path, ending: str) -> None:
    path = altered(tmp_path / "d.sqlite")
    Path(f"{path}{ending}").unlink(missing_ok=True)
    os.mkfifo(f"{path}{ending}")
    for opened in (DriftStore, writer):
        with pytest.raises(WrongKindError, match="pipe"):
            opened(path)
