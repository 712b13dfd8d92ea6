"""The locked question: written once and before the first cell, never in silence another one afterwards."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from steer.errors import ConfigError, DamagedFileError
from steer.experiment.lock import FILE, check_lock, write_lock

DESIGN: dict[str, Any] = {
    "question": {"text": "Does it?", "primary": {"outcome": "gap", "arm": "warm", "against": "random"}, "alpha": 0.05},
    "outcomes": {"gap": {"metric": "logprob_gap", "better": "lower"}},
    "seeds": [0, 1, 2],
    "cells": {"warm.0.0": "abc"},
}


def later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def test_a_locked_question_is_confirmatory(tmp_path: Path) -> None:
    assert check_lock(tmp_path, DESIGN, None) == {"confirmatory": False, "locked": None, "deviations": []}
    file = write_lock(tmp_path, DESIGN, None)
    assert file == tmp_path / FILE and json.loads(file.read_text())["design"] == DESIGN
    for first_cell in (None, later(1)):
        state = check_lock(tmp_path, DESIGN, first_cell)
        assert state["confirmatory"] is True and state["deviations"] == []
        assert abs((datetime.fromisoformat(state["locked"]) - datetime.now(UTC)).total_seconds()) < 60


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": [0, 1]}, "seeds: locked [0, 1, 2], now [0, 1]"),
        ({"question": {**DESIGN["question"], "alpha": 0.1}}, "question.alpha: locked 0.05, now 0.1"),
        ({"outcomes": {"gap": {"metric": "logprob_gap", "better": "higher"}}}, 'outcomes.gap.better: locked "lower", now "higher"'),
        ({"outcomes": {}}, 'outcomes.gap: locked {"metric": "logprob_gap", "better": "lower"}, now null'),
        ({"cells": {"warm.0.0": "abd"}}, 'cells.warm.0.0: locked "abc", now "abd"'),
        ({"cells": {**DESIGN["cells"], "warm.0.9": "x"}}, 'cells.warm.0.9: locked null, now "x"'),
    ],
)
def test_every_deviation_is_listed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write_lock(tmp_path, DESIGN, None)
    state = check_lock(tmp_path, {**DESIGN, **change}, later(1))
    assert state["confirmatory"] is False and says in state["deviations"]


def test_a_lock_that_is_later_than_a_cell_confirms_nothing(tmp_path: Path) -> None:
    write_lock(tmp_path, DESIGN, None)
    began = later(-5)
    state = check_lock(tmp_path, DESIGN, began)
    assert state["confirmatory"] is False and state["deviations"] == [f"the first cell began {began}, before the lock"]


def test_a_question_is_locked_once_and_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too late to lock"):
        write_lock(tmp_path, DESIGN, later(-5))
    assert not list(tmp_path.iterdir())
    written = write_lock(tmp_path, DESIGN, None).read_bytes()
    with pytest.raises(ConfigError, match="locked already"):
        write_lock(tmp_path, {**DESIGN, "seeds": [0]}, None)
    assert (tmp_path / FILE).read_bytes() == written


@pytest.mark.parametrize("kind", ["altered", "cut", "another", "unsealed"])
def test_an_altered_lock_is_refused(tmp_path: Path, kind: str) -> None:
    file = write_lock(tmp_path, DESIGN, None)
    text = file.read_text()
    content = json.loads(text)
    file.write_text(
        {
            "altered": text.replace('"lower"', '"higher"'),
            "cut": text[: len(text) // 2],
            "another": "[]",
            "unsealed": json.dumps({key: content[key] for key in ("locked", "design")}),
        }[kind]
    )
    with pytest.raises(DamagedFileError, match=FILE):
        check_lock(tmp_path, DESIGN, None)
