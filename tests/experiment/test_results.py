"""metrics.json: numbers that follow from the measures, strict JSON, a report that reads it, a verdict that claims no more than is shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from drift.drift_helpers import prompts
from experiment.results_helpers import ALL, PLAIN, RANDOM, TRAIT, collect, directions, measures
from families import FAMILIES

from steer.drift import DriftTracker
from steer.errors import NonFiniteError
from steer.experiment import results
from steer.experiment.arms import Arm
from steer.report import summary_table, write_report


def test_numbers_follow_from_the_measures() -> None:
    metrics = collect(*ALL)
    assert [arm["name"] for arm in metrics["arms"]] == ["plain", "steered", "noise", "later"]
    before, after = measures(0.0), measures(0.5, seed=3)
    for name, values in metrics["arms"][1]["metrics"].items():
        change = after[name] - before[name]
        assert values["change"] == pytest.approx(float(change.mean()))
        assert values["after"] - values["before"] == pytest.approx(values["change"])
        assert values["ci"][0] < values["change"] < values["ci"][1]
        assert (values["n"], values["per_item"]) == (len(change), after[name].tolist())
    assert metrics["trait"]["site"] == "layers.1.output" and metrics["trait"]["relative_dose"] == pytest.approx(0.2)
    assert set(metrics["trait"]["auc_by_site"]) == {f"layers.{layer}.output" for layer in range(3)}
    steer = {arm["name"]: arm["steer"] for arm in metrics["arms"]}
    assert steer["plain"] == {"when": "never", "direction": "none", "strength": 0.0}
    assert steer["steered"]["relative_dose"] == pytest.approx(0.4) and steer["steered"]["scope"] == "response"


def test_every_pair_is_compared_in_every_metric_as_one_family() -> None:
    comparisons = collect(*ALL)["comparisons"]
    pairs = {(comparison["metric"], frozenset((comparison["a"], comparison["b"]))) for comparison in comparisons}
    assert len(comparisons) == len(pairs) == 6 * len(results.UNITS)
    assert all(comparison["p_adjusted"] >= comparison["p"] for comparison in comparisons)
    assert all("18 contrasts" in comparison["verdict"] for comparison in comparisons)


def test_strict_json_that_the_report_can_read(tmp_path: Path) -> None:
    metrics = collect(*ALL)
    text = results.to_json(metrics)
    back = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert back == metrics
    page = write_report(tmp_path / "report.html", back, {}).read_text()
    assert metrics["specificity"]["statement"] in page and "a [cat]" in page
    assert summary_table(back).row_count == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named(bad: float) -> None:
    metrics = collect(*ALL)
    metrics["arms"][2]["train"]["loss"] = [1.0, bad]
    with pytest.raises(NonFiniteError, match="arms.2.train.loss.1") as caught:
        results.to_json(metrics)
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


# ---- was it the direction?


def test_specific_when_it_beats_both_the_plain_and_the_random_arm() -> None:
    verdict = collect(*ALL)["specificity"]
    assert verdict["specific"] is True and "specific to the direction" in verdict["statement"]
    assert verdict["trait_minus_plain"] == pytest.approx(-1.5, abs=0.1) and verdict["trait_minus_random"] == pytest.approx(-1.4, abs=0.1)
    assert all(f"{-verdict[name]:.2f}" in verdict["statement"] for name in ("trait_minus_plain", "trait_minus_random"))
    assert len(verdict["tests"]) == 2


@pytest.mark.parametrize(
    ("plain", "steered", "noise"),
    [
        pytest.param(2.0, 0.5, 0.5, id="a random direction does as much"),
        pytest.param(2.0, 0.5, 0.2, id="a random direction does more"),
        pytest.param(0.5, 0.5, 2.0, id="no better than plain"),
        pytest.param(0.5, 2.0, 3.0, id="worse than plain"),
        pytest.param(1.0, 1.0, 1.0, id="nothing happened"),
    ],
)
def test_not_specific_otherwise(plain: float, steered: float, noise: float) -> None:
    verdict = collect((PLAIN, plain), (TRAIT, steered), (RANDOM, noise))["specificity"]
    assert verdict["specific"] is False and verdict["statement"].startswith("Not shown to be specific")
    assert verdict["trait_minus_plain"] == pytest.approx(steered - plain, abs=0.1)
    assert verdict["trait_minus_random"] == pytest.approx(steered - noise, abs=0.1)


def test_the_order_of_the_arms_changes_no_sign() -> None:
    in_order, reversed_order = (collect(*arms)["specificity"] for arms in (ALL[:3], (ALL[2], ALL[1], ALL[0])))
    assert in_order["specific"] is reversed_order["specific"] is True
    for name in ("trait_minus_plain", "trait_minus_random"):
        assert in_order[name] < -1 and reversed_order[name] < -1


@pytest.mark.parametrize("missing", ["plain", "steered", "noise"])
def test_without_one_of_the_arms_nothing_is_claimed(missing: str) -> None:
    verdict = collect(*(entry for entry in ALL if missing not in (entry[0].name, entry[0].uses)))["specificity"]
    assert verdict.keys() == {"specific", "statement"} and verdict["specific"] is None and verdict["statement"].startswith("Not tested")
    there = verdict["statement"].partition("trained here: ")[2]
    assert [word in there for word in ("trait at 2", "random at 2", "plain")] == [missing != name for name in ("steered", "noise", "plain")]


def test_a_random_arm_of_another_strength_is_no_control() -> None:
    """Its push is weaker, so that it does less says nothing about the direction."""
    weak = replace(RANDOM, strength=0.5)
    verdict = collect((PLAIN, 2.0), (TRAIT, 0.5), (weak, 1.9))["specificity"]
    assert verdict["specific"] is None and "trait at 2" in verdict["statement"] and "random at 0.5" in verdict["statement"]


def test_the_arms_that_are_compared_are_those_of_equal_strength_and_are_named() -> None:
    weak_trait, weak = Arm("weak", "weak", "train", "trait", 0.5), Arm("whisper", "whisper", "train", "random", 0.1)
    opposite = replace(RANDOM, strength=-2.0)
    arms = ((PLAIN, 2.0), (weak_trait, 1.5), (weak, 0.1), (TRAIT, 0.5), (opposite, 1.9), (replace(PLAIN, name="last"), 0.0))
    verdict = collect(*arms)["specificity"]
    assert verdict["arms"] == {"trait": "steered", "plain": "plain", "random": "noise"} and verdict["specific"] is True
    assert verdict["trait_minus_plain"] == pytest.approx(-1.5, abs=0.1) and verdict["trait_minus_random"] == pytest.approx(-1.4, abs=0.1)
    assert "(strength 2)" in verdict["statement"] and "(strength -2)" in verdict["statement"]


@pytest.mark.parametrize(("strength", "word"), [(2.0, "along"), (-2.0, "against")])
@pytest.mark.parametrize("gap", [0.5, 2.0])
def test_a_negative_strength_is_against_the_trait(strength: float, word: str, gap: float) -> None:
    statement = collect((PLAIN, 2.0), (replace(TRAIT, strength=strength), gap), (RANDOM, 1.9))["specificity"]["statement"]
    assert f"teering {word} the trait direction" in statement and "one random direction" in statement


def test_one_arm_alone_has_no_comparison() -> None:
    metrics = collect(ALL[0])
    assert metrics["comparisons"] == [] and metrics["specificity"]["specific"] is None
    results.to_json(metrics)


# ---- drift records


def test_records_are_read_from_the_stores_that_the_metrics_name(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    tracker = DriftTracker(
        {"loud": directions()["layers.1.output"]}, probe=prompts(4), controls=3, stream=False, store=tmp_path / "d" / "a.sqlite"
    )
    with tracker.attached(model):
        written = tracker.measure(0)
    records = results.drift_records(tmp_path, {"drift": {"stores": {"a": "d/a.sqlite"}}})
    assert list(records) == ["a"] and {record.direction for record in records["a"]} == {record.direction for record in written}
    assert len(records["a"]) == len(written) == 4
