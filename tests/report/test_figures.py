"""The picture of a drift curve, the curves behind it, the chart of the primary outcome, the numbers as text and the summary table."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.trees import MEANS
from rich.console import Console

from steer.drift.records import DriftRecord
from steer.errors import ConfigError, WrongKindError
from steer.report import comparison_figure, drift_figure, numbers, summary_table
from steer.report.curves import chance_bound, drift_curves, natural
from steer.report.numbers import NARROW, common_digits
from steer.report.palette import ROLES
from steer.report.run_plots import running_mean, running_width
from steer.report.view import Forest, forest, spoken

Drift = dict[str, list[DriftRecord]]


def record(step: int, effect: float, *, kind: str = "named", direction: str = "trait", **metrics: float) -> DriftRecord:
    metrics = {"mean": 0.0, "sd": 1.0, "change": 2 * effect, "effect_sd": effect, **metrics}
    return DriftRecord(step, "probe", direction, "layers.1.output", kind, 8, metrics)


def test_band_is_symmetric_and_belongs_to_arm_and_step() -> None:
    controls = [record(4, effect, kind="control", direction=f"c{i}") for i, effect in enumerate((-1.0, 0.5, 0.2, -0.1))]
    controls_of_b = [record(4, 9.0, kind="control", direction="c0")]
    (curve,) = drift_curves({"a": [record(4, 3.0), *controls, record(0, 0.0)], "b": [record(4, 3.0), *controls_of_b]})
    first, second = curve.arms
    assert first.steps.tolist() == [0, 4] and first.effect.tolist() == [0.0, 3.0]
    assert math.isnan(first.band[0]) and first.band[1] == pytest.approx(np.quantile([1.0, 0.5, 0.2, 0.1], 0.9))
    assert (first.controls, second.controls) == (4, 1)


def test_beyond_chance_asks_for_more_the_more_is_looked_at() -> None:
    """The bound that docs/drift.md gives for one look, and what becomes of random directions under it."""
    assert round(chance_bound(16, 1), 1) == 2.1 and chance_bound(16, 1) < chance_bound(16, 24) < chance_bound(4, 24)
    controls = [record(4, 1.0, kind="control", direction=f"c{i}") for i in range(16)]
    curves = {z: drift_curves({"a": [record(4, z, z_controls=z), *controls]})[0].arms[0] for z in (-3.0, 2.0, math.nan)}
    assert (curves[-3.0].beyond(1), curves[-3.0].beyond(24)) == ((1, 1), (0, 1))
    assert (curves[2.0].beyond(1), curves[math.nan].beyond(1)) == ((0, 1), (0, 0))
    assert drift_curves({"a": [record(4, 9.0, z_controls=9.0)]})[0].arms[0].beyond(1) == (0, 0), "without controls"
    noise = np.random.default_rng(0).standard_normal((4000, 24, 17))  # runs, looks, a direction and its controls
    z = np.abs(noise[..., 0]) / np.sqrt((noise[..., 1:] ** 2).mean(-1))
    assert 0.03 < (z > chance_bound(16, 24)).any(1).mean() < 0.06


def test_runs_of_one_arm_are_one_curve_with_their_mean() -> None:
    controls = [record(4, 1.0, kind="control", direction=f"c{i}") for i in range(16)]
    runs = {f"a{z}": [record(0, 0.0), record(4, z, z_controls=z), *controls] for z in (1.0, 9.0)}
    (curve,) = drift_curves({**runs, "b": [record(4, 2.0, z_controls=2.0)]}, arms={"a1.0": "a", "a9.0": "a"})
    a, b = curve.arms
    assert (a.arm, b.arm) == ("a", "b") and len(a.runs) == 2
    assert a.effect.tolist() == [0.0, 5.0] and math.isnan(a.band[0]) and a.band[1] == 1.0
    assert a.beyond(1) == (1, 2) and [run.last.effect_sd for run in a.runs] == [1.0, 9.0]


def test_class_gaps_put_controls_on_the_scale_of_the_direction() -> None:
    # the direction moved by 6 in units of the activation, which is half a class gap: a gap is 12
    (curve,) = drift_curves({"a": [record(1, 3.0, effect_gap=0.5), record(1, -6.0, kind="control", direction="c")]}, unit="gap")
    assert curve.arms[0].effect.tolist() == [pytest.approx(0.5)]
    assert curve.arms[0].band.tolist() == [pytest.approx(1.0)]
    with pytest.raises(ConfigError, match="unknown unit"):
        drift_curves({}, unit="metres")


def test_sites_come_in_the_order_of_the_layers() -> None:
    ordered = ["final_norm", "layers.9.output", "layers.10.output"]
    assert sorted(reversed(ordered), key=natural) == ordered


def test_draws_into_both_formats(tmp_path: Path, synthetic_drift: Drift) -> None:
    png = drift_figure(synthetic_drift, tmp_path / "new" / "drift.png", site="layers.16.output")
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = drift_figure(synthetic_drift, tmp_path / "drift.svg", unit="gap", labels={"plain": "$5 tip"}, notes={"plain": "a note"})
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    for words in ("condescension", "layers.12.output", "$5 tip", "a note", "class gaps", "of 16 random directions", "optimiser step"):
        assert words in text


def test_refuses_what_it_cannot_draw(tmp_path: Path, synthetic_drift: Drift) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        drift_figure(synthetic_drift, tmp_path / "drift.jpg")
    with pytest.raises(ConfigError, match=r"condescension at layers\.12\.output \(probe\)"):
        drift_figure(synthetic_drift, tmp_path / "drift.png", site="layers.3.output")
    with pytest.raises(ConfigError, match="no records of a named direction"):
        drift_figure({}, tmp_path / "drift.png")
    assert not list(tmp_path.iterdir())


def test_one_step_without_controls_can_be_drawn(tmp_path: Path) -> None:
    assert drift_figure({"a": [record(0, 0.0)]}, tmp_path / "drift.svg").stat().st_size > 0


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_stand_out_from_the_paper(scheme: int) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    paper = luminance(ROLES["paper"][scheme])
    for role in ("ink", "muted", *(role for role in ROLES if role.startswith("arm-"))):
        dark, light = sorted((luminance(ROLES[role][scheme]), paper))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{role}: WCAG AA asks for 4.5"


def test_forest_shares_one_scale_with_zero() -> None:
    wide, bare, absent = forest([(1.0, [0.0, 3.0]), (-1.0, None), (math.nan, None)])
    assert wide is not None and wide.low == wide.zero and wide.high == 96
    assert bare == Forest(wide.zero, 4.0, None, None) and absent is None
    assert forest([(0.0, [0.0, 0.0])]) == [None], "no scale can hold a single point"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: numbers.number(-0.0), "0.000"),
        (lambda: numbers.number(-1.234, signed=True), "\u22121.23"),
        (lambda: numbers.number(1234567.0), "1.2e+06"),
        (lambda: numbers.number(12345.0), "12\u202f345"),
        (lambda: numbers.number(1e-5), "1.0e\u221205"),
        (lambda: numbers.number(-0.001, digits=2, signed=True), "0.00"),
        (lambda: numbers.number(True), "not measured"),
        (lambda: numbers.interval([1, math.nan]), ""),
        (lambda: numbers.p_value(0.0), "<\u202f0.001"),
        (lambda: numbers.overhead(0.021), "+2.1\u202f%"),
        (lambda: numbers.overhead(0.021, [0.011, 0.034]), "+2.1\u202f% [+1.1, +3.4]"),
        (lambda: numbers.overhead(0.021, [-0.011, 0.034]), "+2.1\u202f% [\u22121.1, +3.4], within noise"),
        (lambda: numbers.duration(3.21), "3.2 s"),
        (lambda: numbers.duration(7380), "2 h 3 min"),
        (lambda: numbers.moment("last week"), "last week"),
        (lambda: numbers.moment(None), "not recorded"),
    ],
)
def test_numbers(call: Any, text: str) -> None:
    assert call() == text


def test_running_mean_keeps_length_and_ends() -> None:
    assert running_width(5) == 1 and running_width(60) == 7
    assert running_mean([1.0, 2.0, 6.0, 7.0], 3).tolist() == [1.5, 3.0, 5.0, 6.5]


def printed(metrics: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(metrics))
    return console.export_text()


def test_summary_table(five_seeds: dict[str, Any]) -> None:
    del five_seeds["arms"][4]["outcomes"]["behaviour_gap"]
    text = printed(five_seeds, 100)
    assert all(len(line) <= 100 for line in text.splitlines())
    words = " ".join(text.split())
    assert words.index(five_seeds["question"]["text"]) < words.index("Yes: preventative has lower behaviour gap than random")
    for part in ("lower is better", "nat/token", "against random", "p < 0.001", "not measured", "Confirmatory", "36 items"):
        assert part in " ".join(words.replace(NARROW, " ").split()), part
    assert [name for name in MEANS if f" {name} " in text] == list(MEANS)
    low, high = five_seeds["contrasts"][0]["ci"]
    assert f"[{low:+.2f}, {high:+.2f}]".replace("-", numbers.MINUS) in text, "the interval that goes with the p"
    with pytest.raises(WrongKindError):
        summary_table({"arms": []})


def test_summary_of_little(bare: dict[str, Any]) -> None:
    assert "Items only: one seed" in printed(bare, 80)
    assert summary_table({"schema": 2}).row_count == 0
    for arm in bare["arms"]:
        for values in arm["outcomes"].values():
            values.pop("change")
    text = printed(bare, 80)
    assert "change from" not in text and all(len(line) <= 80 for line in text.splitlines())


# ---- the chart of the primary outcome


def test_comparison_figure_shows_arms_seeds_and_draws(five_seeds: dict[str, Any]) -> None:
    figure = comparison_figure(five_seeds)
    (axes,) = figure.axes
    label = axes.get_xlabel()
    assert "behaviour gap, change from the base model, nat/token" in label and "lower is better" in label
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == list(MEANS)
    of_random = five_seeds["arms"][2]["outcomes"]["behaviour_gap"]
    points = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert len(points) == 5 * (5 + 1) + 8
    wanted = [*of_random["by_draw"], *of_random["by_seed"].values(), of_random["mean"]]
    assert all(min(abs(point - (value - of_random["before"])) for point in points) < 1e-9 for value in wanted)
    intervals = [
        sorted(map(float, line.get_xdata())) for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert sorted(of_random["change_ci"]) in [pytest.approx(ends) for ends in intervals]
    png = io.BytesIO()
    figure.savefig(png)
    assert png.getvalue().startswith(b"\x89PNG")


def test_comparison_figure_without_a_base_or_an_arm(bare: dict[str, Any]) -> None:
    for arm in bare["arms"]:
        for values in arm["outcomes"].values():
            for key in ("change", "change_ci", "before"):
                values.pop(key)
    assert "change" not in comparison_figure(bare).axes[0].get_xlabel()
    with pytest.raises(ConfigError, match="nothing to draw"):
        comparison_figure({"schema": 2})


def test_a_bound_near_zero_keeps_its_sign() -> None:
    assert common_digits([(0.24, [0.1, 0.4])]) == 3 and common_digits([(0.74, [0.6, 0.9])]) == 2
    assert common_digits([(0.74, [-0.001, 1.4])]) == 3 and common_digits([(0.74, [0.0, 1.4])]) == 2
    assert numbers.interval([-0.001, 0.7], signed=True, digits=3) == "[\u22120.001, +0.700]"


def test_names_of_outcomes_are_spoken_and_those_of_arms_stay_as_they_are() -> None:
    tree = {"outcomes": {"warm_gap": {}, "cold": {}, "loud": {}}, "arms": [{"name": "warm_gap_2"}, {"name": "loud"}]}
    assert spoken(tree, "warm_gap of warm_gap_2 against loud") == "warm gap of warm_gap_2 against loud"
