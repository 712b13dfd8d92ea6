"""Leases: of several processes, on one machine or many, one at a time works in a folder.

A lease is a numbered file that its holder touches every few seconds. When the holder is killed nobody touches it any more, and another
process takes the folder over by making the file of the next number: at once where it can see that the holder is gone, after a minute
elsewhere. A file is made by one process only, and the newest is never removed, so that of several who want a folder one gets it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATTERN = "lease.*.json"
HEARTBEAT = 5.0  # seconds between two touches
EXPIRY = 60.0  # seconds without a touch, after which a holder that cannot be seen counts as gone
_RETURNED = 0  # time of the last touch of a lease that was given back: needs no room on the disk


@contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Holds a folder for the block; False, without waiting, when somebody else does.

    Example:
        >>> with lease(folder) as is_mine:
        ...     if is_mine:
        ...         work(folder)
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _taken(folder)
    if file is None:
        yield False
        return
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, stop), daemon=True)
    try:
        heart.start()
        yield True
    finally:
        stop.set()
        with suppress(RuntimeError):  # interrupted before it began
            heart.join()
        with suppress(FileNotFoundError):  # taken over by somebody who could not see us, or a folder that is gone
            os.utime(file, (_RETURNED, _RETURNED))


def is_held(folder: Path) -> bool:
    """Somebody works in a folder now."""
    number = _newest(folder)
    return number > 0 and not _is_free(_file(folder, number))


def _taken(folder: Path) -> Path | None:
    """The lease of a folder, if it is to be had."""
    newest = _newest(folder)
    if newest and not _is_free(_file(folder, newest)):
        return None
    file = _file(folder, newest + 1)
    try:
        made = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:  # somebody was faster
        return None
    with os.fdopen(made, "w", encoding="utf-8") as opened:
        json.dump(_me(), opened)
    if _newest(folder) > newest + 1:  # who took, gave back and removed this number since we looked
        file.unlink(missing_ok=True)
        return None
    for number in _numbers(folder):
        if number <= newest:
            _file(folder, number).unlink(missing_ok=True)
    return file


def _file(folder: Path, number: int) -> Path:
    return folder / PATTERN.replace("*", str(number))


def _numbers(folder: Path) -> list[int]:
    parts = [file.name.split(".")[1] for file in folder.glob(PATTERN)]
    return [int(part) for part in parts if part.isdecimal()]


def _newest(folder: Path) -> int:
    """Number of the newest lease; 0 for a folder that nobody held yet."""
    return max(_numbers(folder), default=0)


def _is_free(file: Path) -> bool:
    """A lease was given back, or its holder is gone."""
    try:
        touched = file.stat().st_mtime
        holder = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # for a newer one
        return False
    except ValueError:  # just made, or by somebody who was killed then
        holder = {}
    if touched == _RETURNED:
        return True
    me = _me()
    if isinstance(holder, dict) and all(holder.get(key) == me[key] for key in ("host", "boot")):
        return _started(holder.get("pid")) != holder.get("started")
    return time.time() - touched > EXPIRY


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    """What tells a machine from itself after a restart, and a container from its host: process numbers begin anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """What tells a running process from a later one of the same number; None for one that has ended."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # another system than Linux
        return ""
    return None if state in "ZX" else fields[18]  # ticks since the machine was started


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        try:
            os.utime(file)
        except OSError:  # taken over by somebody who could not see us, or a folder that is gone
            return
