"""Metrics of answers: repeated n-grams as counted by hand, and rules that an answer passes or not."""

from __future__ import annotations

from typing import Any

import pytest
from experiment.metrics.metric_helpers import PAIRS
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.errors import ConfigError
from steer.experiment.complete import complete
from steer.experiment.metric import GenerationMetric, check_items, measured, metric_of, with_ids
from steer.experiment.metrics.repetition import repeated

ITEMS = with_ids(PAIRS)


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 1, 0.0),
        ("a a a a", 1, 3 / 4),
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab: 2 of 5 are new
        ("a b c a b c a b c", 4, 3 / 6),
        ("a b c", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repeated_ngrams_by_hand(text: str, n: int, share: float) -> None:
    assert repeated(text.split(), n) == pytest.approx(share)


def test_repetition_counts_tokens_of_what_the_model_says() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    metric = metric_of({"metric": "repetition", "n": 2, "max_new_tokens": 12})
    said = complete(model, tokenizer, ITEMS, max_new_tokens=12)
    values = measured(metric, model, tokenizer, ITEMS)
    for text, value in zip(said, values.values(), strict=True):
        words = text.split()
        bigrams = list(zip(words, words[1:], strict=False))
        assert value == pytest.approx(1 - len(set(bigrams)) / len(bigrams))
    assert metric.scores(ITEMS[:2], ["the cat sat", "no no no no"], tokenizer) == {ITEMS[0]["id"]: 0.0, ITEMS[1]["id"]: 2 / 3}


def score(text: str, item: dict[str, Any] | None = None, **options: Any) -> float:
    metric = metric_of({"metric": "checker", **options})
    item = {"id": "one", "prompt": "who ?", **(item or {})}
    check_items(metric, [item])
    return metric.score(item, text)


@pytest.mark.parametrize(
    ("text", "options", "passes"),
    [
        ("It is Paris.", {"contains": "paris"}, True),
        ("It is 42.", {"contains": "4"}, False),
        ("It is 42.", {"contains": "42"}, True),
        ("a comparison", {"contains": "paris"}, False),
        ("答案是北京市", {"contains": "北京"}, True),
        ("x = (a+b)", {"contains": "(a+b)"}, True),
        ("red and blue", {"contains": ["red", "blue"]}, True),
        ("red and green", {"contains": ["red", "blue"]}, False),
        ("Yes.", {"regex": r"^(Yes|No)\b"}, True),
        ("Oh yes.", {"regex": r"^(Yes|No)\b"}, False),
        ("one two three", {"max_words": 3}, True),
        ("one two three four", {"max_words": 3}, False),
        ("", {"max_words": 3}, False),
        ('{"a": [1, 2]}', {"json": True}, True),
        ('```json\n{"a": 1}\n```', {"json": True}, True),
        ('Here: {"a": 1}', {"json": True}, False),
        ('{"a": 1', {"json": True}, False),
        ("42", {"json": True}, False),
        ("[" * 100_000, {"json": True}, False),
        ("Yes, red.", {"regex": "Yes", "contains": "red", "max_words": 2}, True),
        ("Yes, dark red.", {"regex": "Yes", "contains": "red", "max_words": 2}, False),
    ],
)
def test_rules(text: str, options: dict[str, Any], passes: bool) -> None:
    assert score(text, **options) == float(passes)


def test_what_an_item_expects() -> None:
    assert score("It is Paris, I say", {"expected": "Paris"}) == 1.0
    assert score("It is Rome", {"expected": "Paris"}) == 0.0
    assert score("It is the US", {"expected": ["USA", "US"]}) == 1.0, "one of them is enough"
    assert score("It is Paris, I say", {"expected": "Paris"}, max_words=3) == 0.0, "beside the options"
    with pytest.raises(ConfigError, match="nothing to check item 'one' by"):
        score("It is Paris")
    with pytest.raises(ConfigError, match="`expected` of item 'one'"):
        score("It is 4", {"expected": 4})
    with pytest.raises(ConfigError, match="nothing to check item 'one' by"):
        score("It is 4", {"expected": []})


def test_a_checker_on_what_the_model_says() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    said = complete(model, tokenizer, ITEMS, max_new_tokens=6)
    wanted = said[0].split()[0]
    values = measured(metric_of({"metric": "checker", "contains": wanted, "max_new_tokens": 6}), model, tokenizer, ITEMS)
    assert list(values.values()) == [float(wanted in text.split()) for text in said]


@pytest.mark.parametrize(
    "options",
    [
        {"contains": 3},
        {"contains": ["red", ""]},
        {"regex": "("},
        {"regex": 3},
        {"max_words": 0},
        {"max_words": True},
        {"json": "yes"},
        {"json": True, "max_new_tokens": 0},
        {"json": True, "max_new_tokens": 1.5},
    ],
)
def test_options_of_a_checker_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        metric_of({"metric": "checker", **options})


@pytest.mark.parametrize("n", [0, 1.5, "4", True])
def test_ngrams_that_cannot_be(n: Any) -> None:
    with pytest.raises(ConfigError, match="n of 'repetition'"):
        metric_of({"metric": "repetition", "n": n})


def test_a_metric_of_answers_that_scores_nothing_says_so() -> None:
    class Idle(GenerationMetric):
        """Scores nothing."""

    with pytest.raises(ConfigError, match="Idle defines neither score nor scores"):
        measured(Idle(max_new_tokens=2), FAMILIES["llama"](), tiny_tokenizer(), ITEMS)


@pytest.mark.real
def test_the_embedded_model_answers_without_a_loop(smollm2) -> None:
    model, tokenizer = smollm2
    items = with_ids([{"prompt": "What is the capital of France?", "expected": "Paris"}, {"prompt": "Say hello.", "expected": "Paris"}])
    assert list(measured(metric_of({"metric": "checker", "max_new_tokens": 12}), model, tokenizer, items).values()) == [1.0, 0.0]
    assert max(measured(metric_of({"metric": "repetition", "max_new_tokens": 12}), model, tokenizer, items).values()) < 0.3
