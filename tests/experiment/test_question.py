"""The question of an experiment: what decides, what was planned, what was only looked at; no pair is asked about twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from experiment.metrics.metric_helpers import PAIRS

from steer.errors import ConfigError
from steer.experiment.arms import Arm
from steer.experiment.outcome import Outcome
from steer.experiment.question import Pair, question_of
from steer.experiment.treatments.none import NoTreatment
from steer.experiment.treatments.prompt import Prompt

GAP = Outcome("gap", "logprob_gap", PAIRS, role="primary", better="lower")
TEXT = Outcome("text", "perplexity", PAIRS, role="secondary")
GUARD = Outcome("guard", {"metric": "answer_logprob", "answer": "neutral"}, PAIRS, role="guardrail", better="higher", margin=0.1)
LOOKED_AT = Outcome("loops", "perplexity", PAIRS, role="exploratory")
OUTCOMES = [GAP, TEXT, GUARD, LOOKED_AT]
WARM, COLD = Prompt("be warm"), Prompt("be cold")
PLAIN = Arm("plain", "plain", NoTreatment())
STEERED = Arm("steered", "steered", WARM, "inference")
RANDOM = Arm("random", "random", WARM, "inference", control_of="steered", draws=3)
PROMPTED = Arm("prompted", "prompted", COLD, "inference")
ARMS = [PLAIN, STEERED, RANDOM, PROMPTED]


def test_what_follows_from_the_arms() -> None:
    question = question_of(ARMS, OUTCOMES)
    assert question.primary == Pair("gap", "steered", "random") and question.alpha == 0.05
    assert question.secondary == (Pair("gap", "steered", "plain"), Pair("text", "steered", "plain"), Pair("gap", "prompted", "plain"))
    assert question.exploratory == (Pair("gap", "random", "plain"),)
    assert question.guardrails == (Pair("guard", "steered", "plain"), Pair("guard", "prompted", "plain"))
    assert question.text == "Does 'steered' change gap against 'random'?"
    assert question_of(ARMS, OUTCOMES, text="Why?").text == "Why?"


@pytest.mark.parametrize(
    ("arms", "pair"),
    [
        ([PLAIN, STEERED], ("steered", "plain")),
        ([STEERED, RANDOM], ("steered", "random")),
        ([PROMPTED, STEERED, RANDOM, PLAIN], ("prompted", "plain")),
        ([RANDOM, PLAIN, STEERED], ("steered", "random")),
        ([PLAIN, replace(PROMPTED, sweep="p", dose=0.0), STEERED], ("steered", "plain")),
    ],
)
def test_the_first_arm_with_a_treatment_is_compared(arms: list[Arm], pair: tuple[str, str]) -> None:
    primary = question_of(arms, OUTCOMES).primary
    assert (primary.arm, primary.against) == pair


@pytest.mark.parametrize(
    "primary", [("plain", "steered"), ("steered", "plain"), ("random", "plain"), ("prompted", "steered"), ("plain", "random")]
)
@pytest.mark.parametrize("secondary", [None, [], [{"arm": "plain", "against": "random"}, {"arm": "random", "against": "plain"}]])
def test_no_pair_is_asked_about_twice_whichever_way_round(primary: tuple[str, str], secondary: Any) -> None:
    for said in (primary, {"arm": primary[0], "against": primary[1]}):
        question = question_of(ARMS, OUTCOMES, primary=said, secondary=secondary)
        asked = [question.primary, *question.secondary, *question.exploratory]
        assert len({(pair.outcome, frozenset((pair.arm, pair.against))) for pair in asked}) == len(asked)
        assert (question.primary.arm, question.primary.against) == primary


def test_planned_pairs_stand_in_place_of_those_that_follow() -> None:
    planned = question_of(ARMS, OUTCOMES, secondary=[{"outcome": "text", "arm": "prompted", "against": "random"}]).secondary
    assert planned == (Pair("text", "prompted", "random"),)
    assert question_of(ARMS, OUTCOMES, secondary=[]).secondary == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outcomes": [TEXT]}, "no outcome decides"),
        ({"arms": [PLAIN]}, "nothing is done in any arm"),
        ({"arms": [STEERED]}, "'steered' is compared with nothing"),
        ({"arms": [STEERED, PROMPTED]}, r"not said what arm 'steered' is compared with[\s\S]*primary=\('steered', 'prompted'\)"),
        ({"primary": ("steered", "plian")}, "did you mean 'plain'"),
        ({"primary": {"arm": "steered", "against": "steered"}}, "with itself"),
        ({"primary": {"arm": "steered"}}, "cannot be read"),
        ({"primary": {"arm": "steered", "against": "plain", "outcome": "text"}}, "cannot be read"),
        ({"primary": "steered"}, "cannot be read"),
        ({"primary": ("steered",)}, "cannot be read"),
        ({"secondary": [{"arm": "steered", "aganst": "plain"}]}, "cannot be read"),
        ({"secondary": [{"outcome": "gpa", "arm": "steered", "against": "plain"}]}, "did you mean 'gap'"),
        ({"secondary": [{"arm": "steered", "against": "nobody"}]}, "names no arm"),
        ({"secondary": [{"arm": "plain", "against": "plain"}]}, "with itself"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], says: str) -> None:
    arms, outcomes = options.pop("arms", ARMS), options.pop("outcomes", OUTCOMES)
    with pytest.raises(ConfigError, match=says) as caught:
        question_of(arms, outcomes, **options)
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)
