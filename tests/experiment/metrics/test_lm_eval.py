"""lm-evaluation-harness on a task in a folder: scores per document, of the model with its plan, without a trace."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import make_plan
from experiment.metrics.metric_helpers import mean_by_hand
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.errors import ConfigError, ContextError
from steer.experiment.complete import complete
from steer.experiment.metric import check_items, measured, metric_of
from steer.experiment.outcome import Outcome
from steer.intervene import Plan

DOCS = [
    {"question": "where is the cat", "choices": ["on the mat", "in the house"], "label": 0},
    {"question": "where is the dog", "choices": ["good", "under the tree", "no"], "label": 1},
    {"question": "who are you", "choices": ["good cat", "thanks"], "label": 1},
    {"question": "tell a song", "choices": ["yes please", "moon"], "label": 0},
]
TASK = {
    "task": "questions_of_a_test",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "higher_is_better": True}, {"metric": "acc_norm", "higher_is_better": True}],
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCS)) + "\n")
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}}
    (tmp_path / "task.yaml").write_text(json.dumps(TASK | files))  # JSON is YAML
    return {"metric": "lm_eval", "task": TASK["task"], "include_path": str(tmp_path), "score": "acc"}


def by_hand(model: Any, tokenizer: Any, doc: dict[str, Any]) -> float:
    sums = [mean_by_hand(model, tokenizer, doc["question"], choice) * len(choice.split()) for choice in doc["choices"]]
    return float(sums.index(max(sums)) == doc["label"])


def test_scores_by_document(task) -> None:
    model, tokenizer = FAMILIES["llama"]().train(), tiny_tokenizer()
    outcome = Outcome("questions", task)
    assert outcome.better == "higher" and [item["id"] for item in outcome.items] == [f"questions_of_a_test/{i}" for i in range(4)]
    before = torch.get_rng_state(), random.getstate()
    values = measured(outcome.metric, model, tokenizer, outcome.items)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert all(module.training for module in model.modules()) and tokenizer.padding_side == "right"
    assert list(values.values()) == [by_hand(model.eval(), tokenizer, doc) for doc in DOCS] and 0 < sum(values.values()) < 4
    some = [outcome.items[3], outcome.items[1]]
    assert measured(outcome.metric, model, tokenizer, some) == {item["id"]: values[item["id"]] for item in some}
    assert len(metric_of(task | {"limit": 2}).own_items()) == 2


def test_an_attached_plan_is_in_the_scores(task) -> None:
    model, tokenizer, metric = FAMILIES["llama"](), tiny_tokenizer(), metric_of(task)
    items = metric.own_items()
    plain = measured(metric, model, tokenizer, items)
    edit = make_plan(strength=30.0, phases=("validate", "generate")).interventions[0]
    with Plan(dataclasses.replace(edit, scope="all")).attached(model) as attachment:
        steered = measured(metric, model, tokenizer, items)
        assert attachment.fired()["add@layers.1.output"] > 0
        assert list(steered.values()) == [by_hand(model, tokenizer, doc) for doc in DOCS]
    assert measured(metric, model, tokenizer, items) == plain
    with Plan(dataclasses.replace(edit, scope="response")).attached(model), pytest.raises(ContextError, match="response"):
        measured(metric, model, tokenizer, items)


def test_a_system_message_stands_before_all_documents(task) -> None:
    model, tokenizer, metric = FAMILIES["llama"](), tiny_tokenizer(), metric_of(task)
    items = metric.own_items()
    told = measured(metric, model, tokenizer, [{**item, "system": "be rude"} for item in items])
    assert list(told.values()) == [by_hand(model, tokenizer, doc | {"question": f"be rude {doc['question']}"}) for doc in DOCS]
    with pytest.raises(ConfigError, match="one system message"):
        measured(metric, model, tokenizer, [{**item, "system": item["id"]} for item in items])


def test_answers_that_are_generated_and_read_in_two_ways(task, tmp_path: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    said = complete(model, bare(tokenizer), [doc["question"] for doc in DOCS], max_new_tokens=4)
    assert sum(map(bool, said)) > 1, "some of them say something"
    docs = [{"question": doc["question"], "word": text.split()[0] if text else "nothing"} for doc, text in zip(DOCS, said, strict=True)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)) + "\n")
    filters = [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"^\s*(\S+)"}, {"function": "take_first"}]},
        {"name": "all", "filter": [{"function": "take_first"}]},
    ]
    generated = {
        "task": "words_of_a_test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 4, "do_sample": False},
        "filter_list": filters,
        "metric_list": [{"metric": "exact_match", "higher_is_better": True}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(generated))
    spec = {"metric": "lm_eval", "task": "words_of_a_test", "include_path": str(tmp_path)}
    metric = metric_of(spec | {"filter": "first"})
    assert metric.score == "exact_match"
    items = metric.own_items()
    assert list(measured(metric, model, tokenizer, items).values()) == [float(bool(text)) for text in said]
    assert list(measured(metric_of(spec | {"filter": "all"}), model, tokenizer, items).values()) == [
        float(text == doc["word"]) for doc, text in zip(docs, said, strict=True)
    ]
    with pytest.raises(ConfigError, match="more than one filter[\\s\\S]*all, first"):
        measured(metric_of(spec), model, tokenizer, items)
    edit = make_plan(strength=40.0, phases=("generate",)).interventions[0]
    with Plan(dataclasses.replace(edit, scope="response")).attached(model) as attachment:
        measured(metric, model, tokenizer, items)
        assert attachment.fired()["add@layers.1.output"] > 0, "generation tells the response by the cache"


def bare(tokenizer: Any) -> Any:
    """Without the chat template, which lm-eval leaves out too."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": None}, "more than one score"),
        ({"score": "acc_nrm"}, "did you mean 'acc_norm'"),
        ({"include_path": "nowhere"}, "no folder"),
        ({"task": 3}, "task of 'lm_eval'"),
        ({"limit": 0}, "limit of 'lm_eval'"),
        ({"num_fewshot": -1}, "num_fewshot of 'lm_eval'"),
        ({"chat": 1}, "chat of 'lm_eval'"),
    ],
)
def test_what_cannot_be(task, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        metric_of(task | change)


def test_a_filter_that_the_task_does_not_have(task) -> None:
    metric = metric_of(task | {"filter": "strict"})
    with pytest.raises(ConfigError, match="no filter 'strict'"):
        measured(metric, FAMILIES["llama"](), tiny_tokenizer(), metric.own_items())


def test_items_of_another_task(task) -> None:
    for name in ("questions_of_a_test/4", "other/1", "questions_of_a_test"):
        with pytest.raises(ConfigError, match="is none of lm-eval task"):
            check_items(metric_of(task), [{"id": name}])


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"torchsteer\[eval\]"):
        metric_of({"metric": "lm_eval", "task": "arc_easy"})
