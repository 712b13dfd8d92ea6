"""The tables of docs/results/editing.md follow from the files of the benchmarks, and are there for what was measured alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steer.edits.evaluation import EditEvaluation, EditRow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("edit_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setitem(sys.modules, "edit_tables", module)
    return module


def figures(mode: str, **more: Any) -> dict[str, Any]:
    before = {"efficacy": 0.0, "efficacy_probability": 0.1, "paraphrase": 0.0, "neighbourhood": 1.0}
    after = {"efficacy": 1.0, "efficacy_probability": 0.9, "paraphrase": 0.5, "neighbourhood": 0.8}
    final = {**after, "efficacy": 0.0, "efficacy_probability": 0.3} if mode == "sequence" else None
    rows = tuple(EditRow(name, "p", "s", "t", "u", before, after, final, neutral=0.001, seconds=0.25) for name in ("a", "b"))
    return {**EditEvaluation(mode, "memit", ("efficacy", "paraphrase", "neighbourhood"), rows).as_json(), **more}


def markdown(head: Any, rows: Any) -> str:
    return "\n".join("|".join(line) for line in [head, *rows])


def test_rows_of_editors(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.available() == []
    for what in ("single", "sequence"):
        run = {**figures(what), "layers": [4, 5, 6], "records": 2, "value_seconds_per_edit": None if what == "sequence" else 4.5}
        (tmp_path / f"2026_cpu_edit_{what}_memit.json").write_text(json.dumps({"editors": [run]}))
    assert tables.available() == ["single", "sequence"]
    head, before, row = (line.split("|") for line in tables.TABLES["single"](markdown).split("\n"))
    assert before[head.index("NS")] == "100.0 [100.0, 100.0]" and row[:3] == ["memit", "4 to 6", "2"]
    assert row[head.index("CPU s per edit")] == "4.5 + 0.2"
    assert row[head.index("NS kept")].startswith("80.0") and len(head) == len(before) == len(row)
    head, _, row = (line.split("|") for line in tables.TABLES["sequence"](markdown).split("\n"))
    assert row[head.index("ES")].startswith("0.0") and row[head.index("retained")].startswith("0.0")


def test_rows_of_a_fine_tune(tables: ModuleType, tmp_path: Path) -> None:
    arms = {name: {**figures("sequence"), "neutral": {"value": 0.02}} for name in ("unedited", "freeze")}
    (tmp_path / "2026_cpu_edit_fine_tune.json").write_text(json.dumps({"arms": arms, "tune": "text", "steps": 30, "lr": 3e-4}))
    head, plain, row = (line.split("|") for line in tables.TABLES["fine_tune"](markdown).split("\n"))
    assert plain[head.index("retained")] == "" and row[:2] == ["text, 30 steps at 0.0003, seed 1", "freeze"] and row[-1] == "+0.020"
    assert row[head.index("p(new) after the fine-tune")].startswith("0.300")
