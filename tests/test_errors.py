"""Every typed error carries its four parts, also as a copy and through a pickle (a worker process hands its errors on that way)."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from collections.abc import Callable

import pytest

from steer import errors
from steer.drift.store import StoreInUseError
from steer.errors import SteerError, StorageFullError

PARTS = {"expected": "layers 0 to 2", "found": [3, "four"], "remedy": "count from 0"}
TYPES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SteerError)] + [StoreInUseError]
COPIES: dict[str, Callable[[SteerError], SteerError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda error, p=protocol: pickle.loads(pickle.dumps(error, p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("missing", PARTS)
def test_no_part_may_be_left_out(missing: str) -> None:
    with pytest.raises(TypeError, match=missing):
        SteerError("layer 3", **{name: part for name, part in PARTS.items() if name != missing})  # type: ignore[arg-type]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_copy_says_the_same(kind: type[SteerError], how: str) -> None:
    error = kind("layer 3", **PARTS)  # type: ignore[arg-type]
    assert str(error) == "layer 3\n  expected: layers 0 to 2\n  found: [3, 'four']\n  remedy: count from 0"
    error.add_note("in the second arm")
    copied = COPIES[how](error)
    assert type(copied) is kind and copied is not error
    assert str(copied) == str(error) and copied.args == error.args
    assert (copied.what, copied.expected, copied.found, copied.remedy) == ("layer 3", *PARTS.values())
    assert copied.__notes__ == ["in the second arm"]


@pytest.mark.parametrize("how", COPIES)
def test_a_full_disk_keeps_its_number(how: str) -> None:
    error = StorageFullError("no room", expected="8 bytes", found="0 bytes free", remedy="free some space")
    error.errno = errno.ENOSPC
    assert COPIES[how](error).errno == errno.ENOSPC  # type: ignore[attr-defined]
