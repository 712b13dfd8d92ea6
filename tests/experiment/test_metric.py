"""A metric from a name, a mapping, a function or an object; items with names; values that are checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.metric import (
    METRICS,
    GenerationMetric,
    Metric,
    check_items,
    measured,
    metric_of,
    name_of,
    option_names,
    with_ids,
)

ITEMS = with_ids([{"prompt": "who ?"}, {"prompt": "what ?"}])
IDS = [item["id"] for item in ITEMS]


def lengths(model: Any, tokenizer: Any, items: Any) -> list[float]:
    return [float(len(item["prompt"])) for item in items]


class Words(GenerationMetric):
    """Words of an answer."""

    def __init__(self, least: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.least = least

    def score(self, item: Any, text: str) -> float:
        return float(max(len(text.split()), self.least))


def values_of(call: Any) -> dict[str, float]:
    return measured(metric_of(call), FAMILIES["llama"](), tiny_tokenizer(), ITEMS)


# ---- what a metric is made of


def test_every_form_of_a_metric() -> None:
    metric = metric_of("perplexity")
    assert metric.name == name_of(metric) == "perplexity" and metric_of(metric) is metric
    assert metric_of({"metric": "perplexity", "text": "passage"}).keys == ("passage",)
    assert metric_of(Words).max_new_tokens == 48 and name_of(metric_of(Words)) == "Words"
    words = metric_of({"metric": Words, "least": 3, "max_new_tokens": 5})
    assert (words.least, words.max_new_tokens) == (3, 5)
    assert repr(words) == "Words(least=3, max_new_tokens=5)"
    assert option_names(Words) == ["least", "max_new_tokens"]
    assert values_of(lengths) == values_of({"metric": lengths, "unit": "letters"}) == dict(zip(IDS, [5.0, 6.0], strict=True))


def test_every_registered_metric_says_what_it_is() -> None:
    for name in METRICS:
        metric_class = METRICS.get(name)
        assert metric_class.needs in ("forward", "generation", "judge") and metric_class.better in ("higher", "lower", None)
        assert issubclass(metric_class, GenerationMetric) == (metric_class.needs != "forward"), name


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("perplexty", "did you mean 'perplexity'"),
        ({"metric": "repetition", "max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"metric": "repetition", "wrong": 3}, "leave wrong out"),
        ({"metric": Words, "leas": 3}, "did you mean 'least'"),
        ({"n": 3}, "no metric can be made of this"),
        ({}, "no keys"),
        (None, "no metric can be made of this"),
        (3, "no metric can be made of this"),
        ({"metric": 3}, "no metric can be made of this"),
        (dict, "no metric can be made of this"),
        ({"metric": "logprob_gap", "answer": 3}, "option 'answer' of a metric"),
        ({"metric": "function"}, "missing 1 required"),
        ({"metric": "function", "call": 3}, "'3' is no function"),
        ({"metric": lengths, "better": "hihger"}, "did you mean 'higher'"),
        ("nowhere_to_be_found:f", "the module of 'nowhere_to_be_found:f' cannot be imported"),
        ("json:laods", "did you mean 'loads'"),
        ("json:", "is no import path"),
        ("json:__name__", "is no function"),
        ({"metric": "kl_to_base", "of": "passages"}, "did you mean 'passage'"),
        ({"metric": "choice_accuracy", "value": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "choice_accuracy", "length_normalised": 1}, "length_normalised"),
    ],
)
def test_what_no_metric_can_be_made_of(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        metric_of(spec)


def test_a_module_is_no_function_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="no metric can be made of this"):
        metric_of(FAMILIES["llama"]())


# ---- functions


def test_a_function_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics_of_a_test.py").write_text(
        "class Own:\n    @staticmethod\n    def score(model, tokenizer, items):\n        return {item['id']: 2 for item in items}\n"
    )
    (tmp_path / "broken_of_a_test.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert values_of("metrics_of_a_test:Own.score") == dict.fromkeys(IDS, 2.0)
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            metric_of("broken_of_a_test:score")
    finally:
        sys.modules.pop("metrics_of_a_test", None)


@pytest.mark.parametrize(
    "returned", [[1, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), {IDS[1]: np.float32(2), IDS[0]: torch.tensor(1.0)}]
)
def test_what_a_function_may_return(returned: Any) -> None:
    assert values_of(lambda model, tokenizer, items: returned) == dict(zip(IDS, [1.0, 2.0], strict=True))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (3.0, "gives no numbers"),
        ("ab", "gives no numbers"),
        (None, "gives no numbers"),
        ([1.0], "2, one for each item"),
        ([1.0, 2.0, 3.0], "2, one for each item"),
        ([1.0, None], "gives no number at item"),
        ([1.0, "two"], "gives no number at item"),
        (torch.ones(2, 2), "gives no number at item"),
        ({IDS[0]: 1.0}, "1 missing"),
        ({IDS[0]: 1.0, IDS[1]: 2.0, "more": 3.0}, "1 unknown \\(more\\)"),
    ],
)
def test_what_a_function_may_not_return(returned: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        values_of(lambda model, tokenizer, items: returned)


def test_a_function_that_fails_or_gives_no_finite_number() -> None:
    with pytest.raises(ConfigError, match="metric '.*lambda>' failed[\\s\\S]*KeyError: 'answer'"):
        values_of(lambda model, tokenizer, items: [item["answer"] for item in items])
    with pytest.raises(NonFiniteError, match=f"item '{IDS[1]}'"):
        values_of(lambda model, tokenizer, items: [0.0, float("nan")])


# ---- items


def test_items_without_ids_get_one_of_their_content() -> None:
    forwards = with_ids([{"prompt": "a"}, {"prompt": "b"}, {"id": 7, "prompt": "c"}])
    backwards = with_ids([{"prompt": "b"}, {"prompt": "a"}])
    assert [item["id"] for item in backwards] == [forwards[1]["id"], forwards[0]["id"]] and forwards[2]["id"] == "7"
    twice = with_ids([{"prompt": "a"}, {"prompt": "a"}])
    assert len({item["id"] for item in twice}) == 2 and with_ids(twice) == twice
    with pytest.raises(ConfigError, match="two items are called 'x'"):
        with_ids([{"id": "x"}, {"id": "x"}])
    with pytest.raises(ConfigError, match="item 2"):
        with_ids([{"id": "x"}, "prompt"])  # type: ignore[list-item]


def test_items_that_a_metric_cannot_read() -> None:
    with pytest.raises(ConfigError, match="nothing to measure 'perplexity' on"):
        check_items(metric_of("perplexity"), [])
    for text in (None, " ", 3):
        with pytest.raises(ConfigError, match="lacks text"):
            check_items(metric_of("perplexity"), [{"id": "one", "text": text}])


def test_a_metric_needs_no_more_than_items() -> None:
    class Two(Metric):
        """Always 2."""

        def items(self, model: Any, tokenizer: Any, items: Any) -> dict[str, float]:
            return {item["id"]: 2.0 for item in items}

    metric = Two()
    metric.prepare(None, None, ITEMS)
    check_items(metric, ITEMS)
    assert metric.own_items() is None and values_of(metric) == dict.fromkeys(IDS, 2.0)


def test_a_function_is_called_what_its_author_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def warmth(model: Any, tokenizer: Any, items: Any) -> list[float]:
        return [0.0 for _ in items]

    assert name_of(metric_of(warmth)) == "warmth", "and not by the function that it was written in"
    monkeypatch.setattr(warmth, "__module__", "__main__")
    monkeypatch.setattr(warmth, "__qualname__", "warmth")
    assert name_of(metric_of(warmth)) == "warmth"
