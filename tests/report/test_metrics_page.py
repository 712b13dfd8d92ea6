"""docs/metrics.md explains every key of metrics.json, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metrics_keys import documented, keys, undocumented

from steer.experiment.result import Result
from steer.experiment.scores import Scores


def test_every_key_is_explained_and_every_explained_one_is_there(tmp_path: Path, five_seeds: dict[str, Any], swept: dict[str, Any]) -> None:
    five_seeds["sweep"] = swept["sweep"]
    five_seeds["equal_damage"] += swept["equal_damage"]
    Result(five_seeds, Scores()).save(tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert set(keys(written)) == {key for key in documented() if not key.startswith(("features.", "circuits."))}


def test_what_one_seed_without_a_control_has_is_explained(bare: dict[str, Any]) -> None:
    assert not undocumented(bare) and bare["specificity"] is None and bare["sweep"] == []
    assert undocumented(bare | {"more": 1, "items": [{"id": "a", "rank": 1}]}) == {"more", "items[].rank"}
