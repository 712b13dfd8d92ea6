"""Leases: one holder at a time, whoever asks; taken over when the holder is gone, never while it works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from steer.experiment import lease as module
from steer.experiment.lease import is_held, lease

HOLD = """
import sys, time
from pathlib import Path
from steer.experiment.lease import lease
with lease(Path(sys.argv[1])) as is_mine:
    print(is_mine, flush=True)
    sys.stdin.read()
"""
# tries until it has held the folder `times` times; each time it writes its name, waits, and looks whether the name is still there
RACE = """
import os, random, sys, time
from pathlib import Path
from steer.experiment.lease import lease
folder, times = Path(sys.argv[1]), int(sys.argv[2])
held = 0
while held < times:
    with lease(folder) as is_mine:
        if is_mine:
            made = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # FileExistsError when somebody else is inside
            os.close(made)
            time.sleep(random.random() * 0.002)
            os.unlink(folder / "inside")
            held += 1
            if sys.argv[3:] and random.random() < 0.5:
                os._exit(3)  # without giving it back
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cell"
    assert not is_held(folder)
    with lease(folder) as first, lease(folder) as second:
        assert first and not second and is_held(folder)
    assert not is_held(folder)
    with lease(folder) as again:
        assert again
    assert len(files(folder)) == 1, "one file, however often it was held"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_it_is_given_back_whatever_ends_the_work(tmp_path: Path, stop: type[BaseException]) -> None:
    threads = threading.active_count()
    with pytest.raises(stop), lease(tmp_path):
        assert threading.active_count() == threads + 1
        raise stop
    assert not is_held(tmp_path) and threading.active_count() == threads


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with lease(tmp_path) as mine:
            assert not mine and is_held(tmp_path)
        process.send_signal(signal.SIGKILL)
        while process.poll() is None and not Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            time.sleep(0.01)  # its death is seen before it is waited for
        assert not is_held(tmp_path)
        with lease(tmp_path) as mine:
            assert mine and is_held(tmp_path)


def test_a_later_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    """Process numbers come round again, in a container at every start."""
    with lease(tmp_path):
        (file,) = tmp_path.iterdir()
        written = json.loads(file.read_text())
    assert written["pid"] == os.getpid() and written["started"]
    file.write_text(json.dumps(written | {"started": "1"}))
    assert not is_held(tmp_path)
    file.write_text(json.dumps(written))
    assert is_held(tmp_path)


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "boot": "b", "pid": 1, "started": "1"}', "", "{", "[]", "\x00"])
def test_a_holder_that_cannot_be_seen_is_gone_after_a_while(tmp_path: Path, content: str) -> None:
    file = tmp_path / "lease.7.json"
    file.write_text(content)
    with lease(tmp_path) as mine:
        assert not mine
    stale = time.time() - module.EXPIRY - 1
    os.utime(file, (stale, stale))
    assert not is_held(tmp_path)
    with lease(tmp_path) as mine:
        assert mine and files(tmp_path) == ["lease.8.json"]


def test_the_holder_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    with lease(tmp_path):
        (file,) = tmp_path.iterdir()
        os.utime(file, (1, 1))
        for _ in range(500):
            if (touched := file.stat().st_mtime) > 1:
                break
            time.sleep(0.01)
        assert touched > time.time() - 60
    assert file.stat().st_mtime == 0


def test_a_folder_that_goes_away_under_its_holder_ends_nothing(tmp_path: Path) -> None:
    with lease(tmp_path / "cell") as mine:
        assert mine
        for file in (tmp_path / "cell").iterdir():
            file.unlink()
        (tmp_path / "cell").rmdir()
    assert not (tmp_path / "cell").exists()


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_many_threads_one_gets_it(tmp_path: Path, abandoned: bool) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if abandoned:
            (folder / "lease.3.json").write_text("{}")
            os.utime(folder / "lease.3.json", (1, 1))
        start, stop = threading.Barrier(12), threading.Barrier(12)
        got: list[bool] = []

        def take(folder: Path = folder, start: threading.Barrier = start, stop: threading.Barrier = stop, got: list[bool] = got) -> None:
            start.wait()
            with lease(folder) as mine:
                got.append(mine)
                stop.wait()  # the holder holds on until all have tried

        threads = [threading.Thread(target=take) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 11 + [True]


@pytest.mark.parametrize("dies", [False, True])
def test_processes_that_take_turns_are_never_inside_together(tmp_path: Path, dies: bool) -> None:
    """Also when holders die inside, so that those who wait all see an abandoned lease at once."""
    command = [sys.executable, "-c", RACE, str(tmp_path), "30", *(["dies"] if dies else [])]
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, stderr=-1, text=True)) for _ in range(5)]
        ended = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert all(not err and code in ((0, 3) if dies else (0,)) for err, code in ended), ended


def test_a_takeover_spares_who_took_it_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two see the same abandoned lease; the slower one looked before the faster one took it."""
    (tmp_path / "lease.1.json").write_text("{}")
    os.utime(tmp_path / "lease.1.json", (1, 1))
    look = module._is_free
    inner: list[bool] = []

    def slow(file: Path) -> bool:
        found = look(file)
        if not inner:
            inner.append(True)
            faster = stack.enter_context(lease(tmp_path))
            assert faster
        return found

    with ExitStack() as stack:
        monkeypatch.setattr(module, "_is_free", slow)
        with lease(tmp_path) as mine:
            assert not mine and is_held(tmp_path)


def test_a_number_that_was_used_up_in_between_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While we looked others held the folder twice, and removed the number that we were about to take."""
    (tmp_path / "lease.1.json").write_text("{}")
    os.utime(tmp_path / "lease.1.json", (1, 1))
    look = module._is_free
    seen: list[bool] = []

    def slow(file: Path) -> bool:
        found = look(file)
        if not seen:
            seen.append(found)
            with lease(tmp_path) as first:
                assert first
            assert stack.enter_context(lease(tmp_path)) and files(tmp_path) == ["lease.3.json"]
        return found

    with ExitStack() as stack:
        monkeypatch.setattr(module, "_is_free", slow)
        with lease(tmp_path) as mine:
            assert not mine
        assert files(tmp_path) == ["lease.3.json"] and is_held(tmp_path)
