"""What docs/feature_results.py makes of the scores of a run."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"
METHODS = {"clamp": ["clamp x1", "clamp x2"], "at_word": ["at_word x1"], "random": ["random x1"]}


@pytest.fixture(scope="module")
def results() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("feature_results_of_docs", DOCS / "feature_results.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


def scores(path: Path) -> Path:
    """A clamp of 2 nat at +0.1 and 3 nat at +0.3, a mean difference of 3 nat at +0.2, and two random draws about 0."""
    generator = np.random.default_rng(0)
    changes = {
        ("plain", 0): (0, 0), ("clamp x1", 0): (2, 0.1), ("clamp x2", 0): (3, 0.3), ("at_word x1", 0): (3, 0.2),
        ("random x1", 0): (0.5, 0.01), ("random x1", 1): (-0.5, 0.03),
    }  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("outcome", "arm", "draw", "seed", "item", "value"))
        for item in range(30):
            base = generator.normal(-7, 2), generator.normal(3, 1)
            for (arm, draw), change in changes.items():
                for outcome, start, by in zip(("concept", "damage"), base, change, strict=True):
                    writer.writerow((outcome, arm, draw, 0, f"i{item}", start + by + (by != 0) * generator.normal(0, 0.01)))
    return path


def test_effects_at_equal_loss_lie_straight_between_doses(results: ModuleType, tmp_path: Path) -> None:
    table = results.at_budgets(results.values_of(scores(tmp_path / "scores.csv")), METHODS)
    effects = {(row["method"], row["damage"]): row["effect"] for row in table}
    assert effects["clamp", 0.05][0] == pytest.approx(1.0, abs=0.05) and effects["clamp", 0.2][0] == pytest.approx(2.5, abs=0.05)
    assert effects["at_word", 0.1][0] == pytest.approx(1.5, abs=0.05)
    assert effects["clamp - at_word", 0.2][0] == pytest.approx(-0.5, abs=0.05) and effects["clamp - at_word", 0.2][2] < -0.3
    assert effects["random", 0.2][0] == pytest.approx(0, abs=0.05), "two draws, averaged; its largest dose does +0.02"
    assert all(low <= mean <= high for mean, low, high in effects.values())


def test_factors_are_written_with_their_interval(results: ModuleType) -> None:
    assert results.factors(np.log(17), np.log(12), np.log(24)) == "17x [12x, 24x]" and results.factors(0.0, None, None) == "1.00x"
