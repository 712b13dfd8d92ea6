"""Helpers: `steer` run in this process, and metrics without what differs by the clock."""

from __future__ import annotations

import json
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer.cli import main
from steer.experiment.data import DataSet

# the only things that may differ between two runs
TIMES = ("started", "seconds", "overhead", "versions", "command", "json_sha256")


@contextmanager
def logging_restored() -> Iterator[None]:
    """Hydra configures the root logger of the process, Lightning the key Ctrl-C."""
    root = logging.getLogger()
    handlers, level, ctrl_c = root.handlers[:], root.level, signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        yield
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGINT, ctrl_c)


def command(*arguments: str) -> int:
    """Exit status of a command."""
    with logging_restored():
        return main(arguments)


def few_rows(patch: pytest.MonkeyPatch, **counts: int) -> None:
    """Data sets give only the shortest rows of these splits: `few_rows(monkeypatch, probe=4)`."""
    split = DataSet.split

    def few(data: DataSet, name: str, keys: tuple[str, ...] | None = None) -> list[dict[str, str]]:
        rows = split(data, name, keys)
        return sorted(rows, key=lambda row: sum(map(len, row.values())))[: counts[name]] if name in counts else rows

    patch.setattr(DataSet, "split", few)


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def without_times(node: Any) -> Any:
    """Without what may differ between two runs: times, the place of their folder, and whether they were run or read."""
    if isinstance(node, dict):
        return {key: without_times(inner) for key, inner in node.items() if key not in (*TIMES, "folder", "tracker", "folders", "do")}
    return [without_times(inner) for inner in node] if isinstance(node, list) else node
