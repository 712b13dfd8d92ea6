"""Tracked features on the page: the table says what the records say, with the dictionaries, and figures of those that moved most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report.page_reader import render

from steer.drift.records import DriftRecord
from steer.report import drift_figure
from steer.report.curves import drift_curves

SITE = "layers.12.output"
MOVED = {7: 4.0, 11: 0.5, 3: -0.2, 19: 0.1, 23: 0.05, 31: -1.0}


def record(step: int, name: str, kind: str, effect: float, z: float | None = None, group: str = "") -> DriftRecord:
    metrics: dict[str, Any] = {"effect_sd": effect, "change": effect / 8, "density": 0.0312, "density_change": 0.0112}
    metrics |= {"change_low": effect / 8 - 0.01, "change_high": effect / 8 + 0.01}
    if z is not None:
        metrics |= {"z_controls": z, "q": 0.004}
    return DriftRecord(step, "probe", f"{group or 'sae'}/{name}", SITE, kind, 20, metrics)


@pytest.fixture
def of_features() -> dict[str, list[DriftRecord]]:
    records = []
    for step, share in ((0, 0.0), (10, 1.0)):
        records += [record(step, str(i), "feature", share * effect, share * effect * 5) for i, effect in MOVED.items()]
        records += [record(step, f"random-{i}", "feature_control", share * 0.2 * (-1) ** i) for i in range(16)]
        records += [record(step, f"random-{i}", "feature_control", 50.0, group="other") for i in range(16)]
        quality = {"fvu": 0.18 + 0.2 * share, "fvu_change": 0.2 * share, "l0": 32.0 + share, "l0_change": share, "silent": 0.0123}
        records.append(DriftRecord(step, "probe", "sae", SITE, "dictionary", 400, quality))
    return {"plain": records}


def test_the_page_lists_features_and_their_dictionary(tmp_path: Path, five_seeds: dict[str, Any], of_features: Any) -> None:
    words = render(tmp_path, five_seeds, of_features)[1].words("drift")
    first = words.index("sae/7")
    assert first < words.index("sae/31") < words.index("sae/11"), "that which moved most against random ones first"
    row = words[first : first + 160]
    for said in ("3.12 %", "2.00 %", "+0.500", "+0.490 to +0.510", "+4.00", "+20.0", "0.004", "beyond chance"):
        assert said in row, said
    assert "within chance" in words[words.index("sae/23") :][:160]
    for said in ("0.380", "0.180", "33.0", "32.0", "1.23 %", "random features"):
        assert said in words, said
    assert words.count("Drift of sae/") == words.count("Drift of sae/7") * 4, "figures of four"


def test_the_band_is_that_of_the_random_features_of_the_group(of_features: Any) -> None:
    curves = {curve.direction: curve for curve in drift_curves(of_features)}
    assert set(curves) == {f"sae/{i}" for i in MOVED}
    run = curves["sae/7"].arms[0].runs[0]
    assert curves["sae/7"].thing == "feature" and run.controls == 16
    assert run.band[-1] == pytest.approx(0.2)


def test_a_figure_of_a_feature(tmp_path: Path, of_features: Any) -> None:
    path = drift_figure(of_features, tmp_path / "f.svg", direction="sae/7")
    assert "Drift of the feature" in path.read_text()
