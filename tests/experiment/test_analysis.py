"""The tree of an experiment: known answers of made-up scores, and a verdict that claims no more than the contrast shows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from experiment.test_question import GAP, GUARD, PLAIN, PROMPTED, RANDOM, STEERED, WARM

from steer.errors import ConfigError
from steer.experiment.analysis import analyse
from steer.experiment.arms import Arm
from steer.experiment.outcome import Outcome
from steer.experiment.question import question_of
from steer.experiment.scores import Place, Scores
from steer.experiment.treatments.none import NoTreatment

ITEMS = [f"item {i}" for i in range(24)]
OUTCOMES = [GAP, GUARD]
ARMS = [PLAIN, STEERED, RANDOM, PROMPTED]
LIKE_PLAIN = {"steered": 0.0, "random": 0.0, "prompted": 0.0}


def scores_of(
    gap: dict[str, float],
    *,
    guard: dict[str, float] | None = None,
    seeds: int = 1,
    arms: list[Arm] = ARMS,
    outcomes: list[Outcome] = OUTCOMES,
) -> Scores:
    """Every arm is the plain one plus its effect: items differ much, an item in two arms little. gap, guard: effect by arm."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(len(ITEMS), generator=generator, dtype=torch.float64)
    scores = Scores()
    for outcome in outcomes:
        effects = gap if outcome.role == "primary" else guard or {}
        for arm in arms:
            for draw in range(arm.draws):
                for seed in range(seeds):
                    noise = 0.03 * torch.randn(len(ITEMS), generator=generator, dtype=torch.float64)
                    values = level + effects.get(arm.name, 0.0) + noise + 0.01 * draw
                    scores.add(Place(outcome.name, arm.name, draw, seed), dict(zip(ITEMS, values.tolist(), strict=True)))
    return scores


def tree(scores: Scores, *, arms: list[Arm] = ARMS, outcomes: list[Outcome] = OUTCOMES, **options: Any) -> dict[str, Any]:
    analysed = analyse(scores, question_of(arms, outcomes), arms, outcomes, **options)
    assert json.loads(json.dumps(analysed, allow_nan=False)) == json.loads(json.dumps(analysed)), "strict JSON"
    assert len(analysed["verdict"].split()) <= 20
    return analysed


def contrast(analysed: dict[str, Any], a: str, b: str, outcome: str = "gap") -> dict[str, Any]:
    (found,) = (each for each in analysed["contrasts"] if (each["metric"], each["a"], each["b"]) == (outcome, a, b))
    return found


@pytest.mark.parametrize("seeds", [1, 3])
def test_known_effects_come_out(seeds: int) -> None:
    analysed = tree(scores_of({"steered": -0.5, "random": -0.1, "prompted": -0.8}, seeds=seeds))
    for a, b, effect in (("steered", "random", -0.41), ("steered", "plain", -0.5), ("prompted", "plain", -0.8), ("random", "plain", -0.09)):
        found = contrast(analysed, a, b)
        assert found["difference"] == pytest.approx(effect, abs=0.03) and found["ci"][0] < found["difference"] < found["ci"][1]
        assert found["shown"] is True and (found["n"], found["seeds"]) == (24, seeds) and len(found["by_seed"]) == seeds
        assert found["ci"][1] < 0, "an interval that goes with the p"
    assert [each["role"] for each in analysed["contrasts"]] == ["primary", "secondary", "secondary", "exploratory"]
    assert analysed["verdict"].startswith("Yes: steered has lower gap than random")
    assert analysed["specificity"]["rank"] == 1 and analysed["specificity"]["p"] == 0.25, "three draws cannot show more"
    assert analysed["specificity"]["effect"] == pytest.approx(0.5, abs=0.03), "against the untreated arm, in the direction that was wanted"
    assert analysed["wrong_way"]["wrong"] == 0 and analysed["power"]["smallest_effect"] > 0
    assert analysed["question"]["items"] == 24 and analysed["question"]["seeds"] == list(range(seeds))
    assert sum(item["difference"] for item in analysed["items"]) / 24 == pytest.approx(
        contrast(analysed, "steered", "random")["difference"]
    )


def test_means_of_arms_and_changes_against_the_base() -> None:
    scores = scores_of({"steered": -0.5}, seeds=2)
    before = {outcome.name: {item: value + 1 for item, value in scores[Place(outcome.name, "plain", 0, 0)].items()} for outcome in OUTCOMES}
    sizes = {"steered": [{"a": 1.0}], "random": [{"a": 1.0}, {"a": 0.99}, {"a": 1.01}]}
    analysed = tree(scores, before=before, sizes=sizes)
    arms = {arm["name"]: arm for arm in analysed["arms"]}
    steered = arms["steered"]["outcomes"]["gap"]
    assert steered["mean"] == pytest.approx(float(scores.matrix("gap", "steered").values.mean()))
    assert set(steered["by_seed"]) == {"0", "1"} and steered["change"] == pytest.approx(steered["mean"] - steered["before"])
    assert arms["plain"]["outcomes"]["gap"]["change"] == pytest.approx(-1, abs=0.03)
    assert len(arms["random"]["outcomes"]["gap"]["by_draw"]) == 3 and arms["random"]["matched_in"]["draws"] == sizes["random"]
    assert (arms["random"]["control_of"], arms["random"]["draws"], arms["steered"]["matched_in"]["unit"]) == ("steered", 3, "tokens")


@pytest.mark.parametrize("effect", [0.0, 0.003, -0.003])
def test_nothing_is_claimed_that_is_not_shown(effect: float) -> None:
    analysed = tree(scores_of({**LIKE_PLAIN, "steered": effect + 0.01}))
    assert contrast(analysed, "steered", "random")["shown"] is False
    verdict = analysed["verdict"]
    assert verdict.startswith("No effect shown") and "Yes" not in verdict
    assert not any(claim in verdict for claim in ("does not differ", "same", "equal", "no difference between")), "not shown is not absent"


def test_the_wrong_way_is_said() -> None:
    analysed = tree(scores_of({**LIKE_PLAIN, "steered": 0.5}))
    assert analysed["verdict"].startswith("The wrong way: steered has higher gap than random")
    assert analysed["wrong_way"]["share"] == 1.0 and analysed["specificity"]["rank"] == 4


def test_a_broken_guardrail_is_said_whatever_the_effect() -> None:
    for gap, begins in ((-0.5, "Yes"), (0.01, "No effect shown"), (0.5, "The wrong way")):
        analysed = tree(scores_of({**LIKE_PLAIN, "steered": gap}, guard={"steered": -0.6}))
        assert analysed["verdict"].startswith(begins) and analysed["verdict"].endswith("but guard exceeds its margin")
        (broken,) = (each for each in analysed["guardrails"] if each["arm"] == "steered")
        assert broken["outcome"] == "exceeded" and broken["harm"] == pytest.approx(0.6, abs=0.03)
    other = tree(scores_of({**LIKE_PLAIN, "steered": -0.5}, guard={"prompted": -0.6}))
    assert "exceeds" not in other["verdict"], "that of another arm"


def test_a_guardrail_that_is_kept_is_no_but() -> None:
    analysed = tree(scores_of({**LIKE_PLAIN, "steered": -0.5}, guard={"steered": 0.3}))
    assert analysed["verdict"] == "Yes: steered has lower gap than random; 3 control draws are too few to call it specific"


def test_an_effect_that_a_control_draw_reaches_is_not_called_specific() -> None:
    scores = scores_of({"steered": -0.5, "random": 0.0, "prompted": 0.0}, guard={"steered": 0.3})
    better = {item: value - 2 for item, value in scores[Place("gap", "random", 1, 0)].items()}
    for item, value in better.items():
        scores._values[Place("gap", "random", 1, 0)][item] = value + 1.0  # one draw in three goes further, their mean does not
    analysed = tree(scores)
    assert analysed["specificity"]["rank"] == 2
    assert analysed["verdict"] == "Yes: steered has lower gap than random, but 1 of 3 control draws do as much"


def test_long_names_are_cut_and_the_claim_is_not() -> None:
    long = " ".join(f"word{i}" for i in range(12))
    plain, steered = Arm(f"plain {long}", "p", NoTreatment()), Arm(f"steered {long}", "s", WARM, "inference")
    gap = Outcome(f"gap {long}", GAP.metric, GAP.items, role="primary", better="lower")
    guard = Outcome(f"guard {long}", GUARD.metric, GUARD.items, role="guardrail", better="higher", margin=0.1)
    arms, outcomes = [plain, steered], [gap, guard]
    for effect, begins in ((-0.5, "Yes: steered"), (0.0, "No effect shown: gap"), (0.5, "The wrong way: steered")):
        scores = scores_of({steered.name: effect}, guard={steered.name: -0.6}, arms=arms, outcomes=outcomes)
        verdict = tree(scores, arms=arms, outcomes=outcomes)["verdict"]
        assert verdict.startswith(begins) and verdict.endswith("exceeds its margin"), verdict


def test_without_controls_or_untreated_arm_what_needs_them_is_left_out() -> None:
    two = [PLAIN, STEERED]
    analysed = tree(scores_of({"steered": -0.5}, arms=two), arms=two)
    assert analysed["specificity"] is None and len(analysed["trade_off"]) == 1 and analysed["equal_damage"] == []
    pair = [STEERED, Arm("random", "random", WARM, "inference", control_of="steered", draws=3)]
    analysed = tree(scores_of({"steered": -0.5}, arms=pair), arms=pair)
    assert analysed["guardrails"] == [] and analysed["trade_off"] == analysed["equal_damage"] == []
    assert analysed["specificity"]["rank"] == 1


def test_arms_at_equal_damage() -> None:
    """0.8 of effect for 0.4 of damage against 0.2 for 0.4: where both cost 0.2, 0.4 against 0.1."""
    analysed = tree(scores_of({"steered": -0.8, "prompted": -0.2}, guard={"steered": -0.4, "prompted": -0.4, "random": 0.4}, seeds=5))
    of_prompt = next(each for each in analysed["equal_damage"] if each["b"] == "prompted")
    assert of_prompt["a"] == "steered" and of_prompt["damage"] == pytest.approx(0.2, abs=0.02)
    assert of_prompt["difference"] == pytest.approx(0.3, abs=0.03)
    assert of_prompt["low"] < 0.3 < of_prompt["high"] < of_prompt["low"] + 0.2
    of_random = next(each for each in analysed["equal_damage"] if each["b"] == "random")
    assert of_random["difference"] is None and of_random["most_damage"][1] == pytest.approx(-0.4, abs=0.05), "it did the guardrail good"


def test_the_doses_of_a_sweep_are_one_method() -> None:
    doses = [Arm(f"steered x{dose}", "s", WARM, "inference", sweep="steered", dose=dose) for dose in (1.0, 2.0)]
    arms = [PLAIN, *doses, PROMPTED]
    effects, damages = (
        {"steered x1.0": -0.4, "steered x2.0": -0.5, "prompted": -0.1},
        {"steered x1.0": -0.1, "steered x2.0": -0.8, "prompted": -0.2},
    )
    (compared,) = tree(scores_of(effects, guard=damages, seeds=3, arms=arms), arms=arms)["equal_damage"]
    assert (compared["a"], compared["b"]) == ("steered", "prompted")
    assert compared["damage"] == pytest.approx(0.1, abs=0.02) and compared["effect_a"] == pytest.approx(0.4, abs=0.03)
    assert compared["effect_b"] == pytest.approx(0.05, abs=0.03)


def test_scores_that_tell_nothing_or_are_missing_are_refused() -> None:
    constant = Scores()
    for arm in ARMS:
        for draw in range(arm.draws):
            for outcome in OUTCOMES:
                constant.add(Place(outcome.name, arm.name, draw, 0), dict.fromkeys(ITEMS, 1.0))
    with pytest.raises(ConfigError, match="the same for every item in every arm"):
        tree(constant)
    with pytest.raises(ConfigError, match="'gap' of arm 'prompted' was not measured"):
        tree(scores_of({}, arms=ARMS[:3]))


def test_the_rank_is_among_the_draws_of_the_control_that_the_question_names() -> None:
    arms = [PLAIN, STEERED, RANDOM, replace(RANDOM, name="other", label="other", draws=5)]
    scores = scores_of({"steered": -0.5, "other": -1.0}, arms=arms)
    asked = question_of(arms, OUTCOMES, primary=("steered", "other"))
    analysed = analyse(scores, asked, arms, OUTCOMES)
    assert analysed["specificity"]["control"] == "other" and analysed["specificity"]["rank"] == 6
    assert tree(scores, arms=arms)["specificity"]["control"] == "random"


def test_a_control_is_not_said_to_be_what_it_controls() -> None:
    said = {arm["name"]: arm["treatment"]["what"] for arm in tree(scores_of(LIKE_PLAIN))["arms"]}
    assert said["random"] == f"a random partner of {said['steered']}"


@pytest.mark.parametrize(
    ("draws", "tail"),
    [(1, "; 1 control draw is too few to call it specific"), (8, "; 8 control draws are too few to call it specific"), (19, "")],
)
def test_more_than_the_mean_of_a_few_random_edits_is_not_called_specific(draws: int, tail: str) -> None:
    """Of edits that are one more random direction, the best of 9 is above all 8 draws in one of nine experiments."""
    arms = [PLAIN, STEERED, replace(RANDOM, draws=draws), PROMPTED]
    said = tree(scores_of({"steered": -0.5}, arms=arms, outcomes=[GAP]), arms=arms, outcomes=[GAP])["verdict"]
    assert said == f"Yes: steered has lower gap than random{tail}"
