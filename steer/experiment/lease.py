"""Leases: of several processes, on one machine or many, one at a time works in a folder.

A lease is a file that its holder touches every few seconds. When the holder is killed nobody touches it any more, and another process takes
the folder over: at once where it can see that the holder is gone, after a minute elsewhere.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "lease.json"
HEARTBEAT = 5.0  # seconds between two touches
EXPIRY = 60.0  # seconds without a touch, after which a holder that cannot be seen counts as gone


@contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Holds a folder for the block; False, without waiting, when somebody else does.

    Example:
        >>> with lease(folder) as is_mine:
        ...     if is_mine:
        ...         work(folder)
    """
    file = folder / FILE
    name = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    if not (_taken(file, name) or (_is_abandoned(file) and _put_aside(file, name) and _taken(file, name))):
        yield False
        return
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, stop), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        stop.set()
        heart.join()
        if _holder(file).get("name") == name:
            file.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Somebody works in a folder now."""
    file = folder / FILE
    return file.exists() and not _is_abandoned(file)


def _taken(file: Path, name: str) -> bool:
    """Makes the file, which only one process can. Written first and then linked, so that nobody reads a part of it."""
    draft = file.with_name(f"{FILE}.{name}")
    draft.write_text(json.dumps({"name": name, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}), encoding="utf-8")
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _put_aside(file: Path, name: str) -> bool:
    """Takes an abandoned lease away; of several that try, one succeeds."""
    aside = file.with_name(f"{FILE}.{name}.old")
    before = _holder(file)
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return False
    is_theirs = _holder(aside) != before  # of a new holder, who took it over in between
    with suppress(FileExistsError):
        if is_theirs:
            os.link(aside, file)
    aside.unlink()
    return not is_theirs


def _is_abandoned(file: Path) -> bool:
    holder = _holder(file)
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot():
        return not _is_alive(holder.get("pid"))
    try:
        return time.time() - file.stat().st_mtime > EXPIRY
    except FileNotFoundError:
        return True


def _holder(file: Path) -> dict[str, Any]:
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _boot() -> str:
    """What tells a machine from itself after a restart, and a container from its host: process numbers begin anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        try:
            os.utime(file)
        except OSError:  # taken over by somebody who could not see us, or a folder that is gone
            return
