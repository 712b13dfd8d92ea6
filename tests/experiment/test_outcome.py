"""Outcomes: roles with what they need, answers generated once, and numbers that can come out both ways."""

from __future__ import annotations

from typing import Any

import pytest
from experiment.metrics.metric_helpers import PAIRS
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.errors import ConfigError, NonFiniteError
from steer.experiment import outcome as module
from steer.experiment.complete import complete
from steer.experiment.metric import GenerationMetric, Metric, ReadingMetric, measured, metric_of, with_ids, with_system
from steer.experiment.outcome import Outcome, check_informative, check_outcomes, is_constant, measure_all, prepare_all

PRIMARY = Outcome("warmth", "logprob_gap", PAIRS, better="lower")


class Words(GenerationMetric):
    """Words of an answer."""

    better = "higher"

    def score(self, item: Any, text: str) -> float:
        return float(len(text.split()))


def test_an_outcome_is_made_whole() -> None:
    guardrail = Outcome("text", {"metric": "perplexity"}, ({"text": pair["text"]} for pair in PAIRS), role="guardrail", margin=0.02)
    assert (guardrail.metric.name, guardrail.better, guardrail.margin, len(guardrail.items)) == ("perplexity", "lower", 0.02, 4)
    assert all(item["id"] for item in guardrail.items) and repr(guardrail) == "Outcome('text', perplexity, 4 items, guardrail)"
    assert Outcome("text", "perplexity", PAIRS, role="secondary", better="higher").better == "higher", "the experiment may say otherwise"
    assert Outcome("gap", "logprob_gap", PAIRS, role="exploratory").better is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"role": "guardrail"}, "has no margin"),
        ({"role": "guardrail", "margin": 0}, "the margin of outcome 'gap'"),
        ({"role": "guardrail", "margin": float("nan")}, "the margin of outcome 'gap'"),
        ({"role": "guardrail", "margin": "0.02"}, "the margin of outcome 'gap'"),
        ({"role": "guardrail", "margin": 0.02, "better": None}, "which way is better"),
        ({"better": None}, "which way is better"),
        ({"better": "lowr"}, "did you mean 'lower'"),
        ({"role": "gardrail"}, "did you mean 'guardrail'"),
        ({"margin": 0.02}, "a margin, which nothing reads"),
        ({"items": []}, "nothing to measure"),
        ({"items": None}, "nothing to measure"),
        ({"items": 3}, "the items of outcome 'gap'"),
        ({"items": [{"prompt": "who ?"}]}, "lacks trait, neutral"),
        ({"items": [PAIRS[0] | {"id": "a"}, PAIRS[1] | {"id": "a"}]}, "two items are called 'a'"),
        ({"items": PAIRS[:1]}, "outcome 'gap' has one item"),
        ({"items": [*PAIRS, dict(PAIRS[1])]}, f"items 2 and {len(PAIRS) + 1} are the same"),
        ({"metric": "logprob_gp"}, "did you mean 'logprob_gap'"),
        ({"name": " "}, "no name"),
        ({"name": 3}, "the name of an outcome"),
    ],
)
def test_outcomes_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Outcome(**{"name": "gap", "metric": "logprob_gap", "items": PAIRS, "better": "lower", **options})


def test_an_item_counts_twice_where_its_ids_say_so() -> None:
    again = Outcome("gap", "logprob_gap", [{**PAIRS[0], "id": "a"}, {**PAIRS[0], "id": "b"}], better="lower")
    assert [item["id"] for item in again.items] == ["a", "b"]


def test_one_primary_outcome_and_a_name_for_each() -> None:
    second = Outcome("text", "perplexity", PAIRS, role="secondary")
    check_outcomes([PRIMARY, second])
    with pytest.raises(ConfigError, match="two outcomes are called 'text'"):
        check_outcomes([PRIMARY, second, second])
    for wrong, found in (([second], "none"), ([PRIMARY, Outcome("more", "perplexity", PAIRS)], "warmth, more")):
        with pytest.raises(ConfigError, match=f"exactly one\n  found: {found}"):
            measure_all(wrong, FAMILIES["llama"](), tiny_tokenizer())
    with pytest.raises(ConfigError, match="outcome 1"):
        check_outcomes(["warmth"])  # type: ignore[list-item]


def test_answers_are_generated_once_for_all_who_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[str]]] = []

    def counted(model: Any, tokenizer: Any, items: Any, *, max_new_tokens: int) -> list[str]:
        asked.append((max_new_tokens, [item["prompt"] for item in items]))
        return complete(model, tokenizer, items, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(module, "complete", counted)
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    prompts = [{"prompt": pair["prompt"]} for pair in PAIRS]
    outcomes = [
        PRIMARY,
        Outcome("words", Words(max_new_tokens=6), prompts, role="secondary"),
        Outcome("loops", {"metric": "repetition", "n": 1, "max_new_tokens": 6}, prompts[1:], role="exploratory"),
        Outcome("short", Words(max_new_tokens=2), prompts[:2], role="exploratory"),
    ]
    prepare_all(outcomes, model, tokenizer)
    assert not asked
    values = measure_all(outcomes, model, tokenizer)
    assert asked == [(6, [item["prompt"] for item in prompts]), (2, [item["prompt"] for item in prompts[:2]])]
    assert list(values) == ["warmth", "words", "loops", "short"]
    for outcome in outcomes:
        assert values[outcome.name] == measured(outcome.metric, model, tokenizer, outcome.items), outcome.name


def test_the_system_message_of_an_arm_reaches_every_metric() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    outcomes = [PRIMARY, Outcome("words", Words(max_new_tokens=6), PAIRS, role="secondary")]
    told = measure_all(outcomes, model, tokenizer, system="be rude")
    assert told["warmth"] == measured(PRIMARY.metric, model, tokenizer, with_system(PRIMARY.items, "be rude"))
    assert told["words"] == measured(outcomes[1].metric, model, tokenizer, with_system(outcomes[1].items, "be rude"))
    assert told["warmth"] != measure_all(outcomes, model, tokenizer)["warmth"]


def test_what_compares_with_the_base_is_prepared() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    outcomes = [PRIMARY, Outcome("kl", "kl_to_base", PAIRS, role="guardrail", margin=0.05)]
    prepare_all(outcomes, model, tokenizer)
    assert set(measure_all(outcomes, model, tokenizer)["kl"].values()) == {0.0}
    with_more = [PRIMARY, Outcome("kl", "kl_to_base", PAIRS, role="guardrail", margin=0.05)]
    with pytest.raises(ConfigError, match="`prepare`"):
        measure_all(with_more, model, tokenizer)


def test_a_metric_with_items_of_its_own_is_asked_itself() -> None:
    class Fixed(Words):
        """One value whatever is said."""

        def items(self, model: Any, tokenizer: Any, items: Any) -> dict[str, float]:
            return {item["id"]: 5.0 for item in items}

    class Benchmark(Metric):
        """Brings its items."""

        better = "higher"

        def own_items(self) -> list[dict[str, Any]]:
            return [{"id": "one"}, {"id": "two"}]

        def items(self, model: Any, tokenizer: Any, items: Any) -> dict[str, float]:
            return {item["id"]: float(number) for number, item in enumerate(items)}

    outcomes = [Outcome("bench", Benchmark()), Outcome("fixed", Fixed, PAIRS, role="exploratory")]
    values = measure_all(outcomes, FAMILIES["llama"](), tiny_tokenizer())
    assert values["bench"] == {"one": 0.0, "two": 1.0} and set(values["fixed"].values()) == {5.0}


def test_scores_of_answers_are_checked() -> None:
    class Wrong(Words):
        """Fails in one of two ways."""

        def score(self, item: Any, text: str) -> float:
            return float("inf") if item["prompt"] == PAIRS[0]["prompt"] else 1 / 0

    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    with pytest.raises(NonFiniteError, match="metric 'Wrong' is not finite"):
        measure_all([Outcome("w", Wrong(max_new_tokens=2), [PAIRS[0], {**PAIRS[0], "id": "again"}])], model, tokenizer)
    with pytest.raises(ConfigError, match="metric 'Wrong' failed[\\s\\S]*ZeroDivisionError"):
        measure_all([Outcome("w", Wrong(max_new_tokens=2), PAIRS)], model, tokenizer)


def test_a_primary_outcome_that_is_one_number_shows_nothing() -> None:
    constant = {"plain": {"a": 1.0, "b": 1.0}, "warm": {"a": 1.0, "b": 1.0}}
    moved = {"plain": {"a": 1.0, "b": 1.0}, "warm": {"a": 1.0, "b": 0.5}}
    assert is_constant(constant) and not is_constant(moved)
    with pytest.raises(ConfigError, match="the same for every item in every arm[\\s\\S]*1.0 in plain, warm"):
        check_informative(PRIMARY, constant)
    check_informative(PRIMARY, moved)
    check_informative(Outcome("text", "perplexity", with_ids(PAIRS), role="secondary"), constant)
    assert metric_of("perplexity").better == "lower"


class Shifted(ReadingMetric):
    """Has an option on which what it reads depends, and says nothing of sharing."""

    better = "higher"
    keys = ("text",)

    def __init__(self, by: float) -> None:
        self.by = by

    def reading(self, model, tokenizer, items):
        return {item["id"]: len(item["text"]) + self.by for item in items}


def test_a_metric_that_says_nothing_of_sharing_shares_with_none():
    rows = [{"text": "a"}, {"text": "bc"}]
    outcomes = [Outcome(f"by {by}", Shifted(by), rows, role=role) for by, role in ((0.0, "primary"), (5.0, "secondary"))]
    found = measure_all(outcomes, nn.Identity(), None)
    assert [list(values.values()) for values in found.values()] == [[1, 2], [6, 7]]
