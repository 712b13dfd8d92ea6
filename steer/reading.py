"""Reading what may be damaged, hostile or no file at all: every reader begins here, and ends in a typed error instead of a hang.

Only regular files are opened (a named pipe would wait for ever, a device has no end), no more is read than the file had when it was opened,
and JSON has to say one thing: no key twice, no NaN, no number beyond those of a computer.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from steer.checks import of_type
from steer.errors import DamagedFileError, FileError, NonFiniteError, SteerError, WrongKindError, in_file

AGAIN = "get it again from where it came, or restore it from a backup"
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
# the first bytes of files that people mistake for one another
_MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "an array of numpy (.npy)",
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write them",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "an image",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a git-lfs pointer, whose file was not downloaded",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def place_of(path: str | Path) -> Path:
    """A path as it was given, `~` being the user's home. Raises ConfigError for what is no path, FileError for what can be no name."""
    of_type(path, (str, os.PathLike), "the path of a file", "pass the path as text, e.g. 'my_plan'")
    place = Path(os.path.expanduser(path))
    try:
        os.lstat(place)
    except ValueError as error:  # a zero byte
        raise _unreadable(place, error) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _unreadable(place, error) from error
    return place


def size_of(path: Path) -> int:
    """Bytes of a regular file. Raises FileError for nothing there, WrongKindError for what is no file, DamagedFileError beyond memory."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # a loop of links, a name with a zero byte
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise _no_file(path, next((name for is_kind, name in _KINDS.items() if is_kind(status.st_mode)), "something else"))
    if status.st_size > _memory():
        raise _beyond_memory(path, status.st_size)
    return status.st_size


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file, or its first bytes. Raises as `size_of`."""
    size = size_of(path)
    try:
        with path.open("rb") as file:
            return file.read(size if most is None else min(size, most))
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """Raises as `read_bytes`, and DamagedFileError for what is no JSON or says two things."""
    return parse_json(read_bytes(path), f"'{path}'")


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON says. Raises DamagedFileError: no JSON, nested too deep, a key twice. NonFiniteError: NaN, or a number beyond floats."""
    try:
        return json.loads(
            text, object_pairs_hook=_without_doubles, parse_constant=_no_number, parse_float=_finite_float, parse_int=_finite_int
        )
    except OverflowError as error:
        raise _no_finite_number(where, error) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise _no_json(where, error) from error


def check_kinds(content: Any, kinds: dict[str, Any]) -> None:
    """Raises TypeError unless content is an object with these keys and no others, each of its type or types; True is no number."""
    if not isinstance(content, dict):
        raise TypeError(f"{content!r:.60}, which is no object with {', '.join(kinds)}")
    if content.keys() != kinds.keys():
        raise TypeError(f"the keys {', '.join(content) or 'none'}, not {', '.join(kinds)}")
    for key, kind in kinds.items():
        value = content[key]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise TypeError(f"{key}: {value!r:.60}")


def kind_of(head: bytes) -> str | None:
    """What a file is by its first bytes, in words, where they say so."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def damage_of(path: str | Path, expected: str, what: str = "", remedy: str = AGAIN) -> Iterator[None]:
    """Raises DamagedFileError for everything that code stumbles over in the content of a file; typed errors get the name of the file."""
    try:
        yield
    except SteerError as error:
        if isinstance(error, FileError):
            raise
        raise in_file(error, path) from error
    except Exception as error:
        raise damaged(path, expected, f"{type(error).__name__}: {error}", what, remedy) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return content


def _no_number(text: str) -> NoReturn:
    raise OverflowError(text)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise OverflowError(f"{text[:40]}, which is beyond floating point")
    return number


def _finite_int(text: str) -> int:
    if len(text) > 20:  # shorter ones are in range
        _finite_float(text)
    return int(text)


def _memory() -> float:
    """Bytes of memory of this machine, as far as it says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf


# ---- errors


def damaged(path: str | Path, expected: str, found: object, what: str = "", remedy: str = AGAIN) -> DamagedFileError:
    """The error of a file that cannot be what it should be."""
    return DamagedFileError(what or f"cannot read {path}", expected=expected, found=str(found)[:300], remedy=remedy)


def other_kind(path: str | Path, expected: str, found: str) -> WrongKindError:
    """The error of a whole file of another kind."""
    remedy = "give the path of such a file, or read this one as what it is"
    return WrongKindError(f"{path} is a file of another kind", expected=expected, found=found, remedy=remedy)


def _unreadable(path: Path, error: Exception) -> FileError:
    remedy = "check the path, its permissions and the disk"
    return FileError(f"cannot read {path}", expected="a file that can be read", found=str(error), remedy=remedy)


def _no_file(path: Path, kind: str) -> WrongKindError:
    remedy = "give the path of a file; copy what a pipe or a device gives into one first"
    return WrongKindError(f"{path} is no file", expected="a regular file", found=kind, remedy=remedy)


def _beyond_memory(path: Path, size: int) -> DamagedFileError:
    return damaged(path, f"a file that fits into memory, {_memory():.0f} bytes", f"{size} bytes")


def _no_json(where: str, error: Exception) -> DamagedFileError:
    found = "lists or objects nested too deep" if isinstance(error, RecursionError) else error
    return damaged(where, "a JSON text with each key once", found, what=f"{where} cannot be read as JSON")


def _no_finite_number(where: str, error: Exception) -> NonFiniteError:
    return NonFiniteError(f"a number in {where} is not finite", expected="finite numbers", found=error, remedy=AGAIN)
