"""Side effects are the loss of every source and the facts that are completed, with paired intervals over texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from families import FAMILIES
from scipy.stats import t as student
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.bias import fit_mitigation, side_effects
from steer.bias.side_effects import cloze_items
from steer.errors import ConfigError
from steer.model.tokens import Row

SOURCES = {
    "nature": ["sun moon star day night water", "fire earth tree cat dog", "red blue green small"],
    "numbers": ["one two three four five six", "seven eight nine ten"],
    "talk": ["hello how can you tell me", "what is this game", "thanks goodbye please"],
}
ITEMS = [
    {"prompt": "the cat sat on the", "answer": " mat"},
    {"prompt": "one two", "answer": " three"},
    {"prompt": "red blue", "answer": " green"},
    {"prompt": "the capital is", "answer": " Paris"},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"]()


def measured(model: Any, sources: Any = SOURCES, **options: Any) -> Any:
    return side_effects(model, sources, tokenizer=tiny_tokenizer(), **{"items": ITEMS, **options})


def plan(strength: float) -> steer.Plan:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return steer.Plan(steer.Intervention(steer.Add(vector), "layers.1.output", strength=strength))


def nats(model: Any, text: str) -> list[float]:
    """Loss of every token but the first, by hand."""
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return (-logprobs.gather(1, ids[0, 1:, None])[:, 0]).tolist()


def test_the_loss_is_per_token_of_each_source_and_of_all(model: Any) -> None:
    found = measured(model).loss
    tokens = {source: [x for text in texts for x in nats(model, text)] for source, texts in SOURCES.items()}
    assert set(found) == {*SOURCES, "all"}
    for source, values in tokens.items():
        assert found[source] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found["all"] == pytest.approx(sum(map(sum, tokens.values())) / sum(map(len, tokens.values())), abs=1e-5)


def test_the_change_is_paired_and_its_interval_is_over_texts(model: Any) -> None:
    before = measured(model)
    with plan(1.0).attached(model):
        after = measured(model)
        edited = {text: nats(model, text) for texts in SOURCES.values() for text in texts}
    change = after.minus(before)
    sums = torch.tensor([sum(edited[text]) - sum(nats(model, text)) for text in SOURCES["nature"]]).double()
    tokens = torch.tensor([len(edited[text]) for text in SOURCES["nature"]]).double()
    mean = float(sums.sum() / tokens.sum())
    residuals = sums - mean * tokens
    half = float(student.ppf(0.975, 2)) * float((1.5 * residuals.square().sum()).sqrt() / tokens.sum())
    nature = change.loss["nature"]
    assert (nature.value, nature.low, nature.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-5) and nature.n == 3
    assert change.loss["all"].n == 8 and change.loss["all"].value == pytest.approx(after.loss["all"] - before.loss["all"], abs=1e-6)
    assert "nature" in str(change) and "cloze" in str(change)


def test_nothing_changes_without_a_mitigation(model: Any) -> None:
    change = measured(model).minus(measured(model))
    assert all((each.value, each.low, each.high) == (0, 0, 0) for each in (*change.loss.values(), change.accuracy, change.logprob))


def test_facts_are_completed_where_the_answer_is_the_likeliest_token(model: Any) -> None:
    found = measured(model)
    assert [item["answer"] for item in found.items] == [" mat", " three", " green"] and found.left_out == 1
    for i, item in enumerate(ITEMS[:3]):
        ids, answer = (tiny_tokenizer()(item[key]).input_ids for key in ("prompt", "answer"))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert bool(found.completed[i]) is (int(logits.argmax()) == answer[0])
        assert float(found.logprobs[i]) == pytest.approx(float(logits.log_softmax(-1)[answer[0]]), abs=1e-5)
    with torch.no_grad():
        likeliest = int(model(torch.tensor([tiny_tokenizer()("one two").input_ids])).logits[0, -1].argmax())
    items = [{"prompt": "one two", "answer": f" {tiny_tokenizer().decode([likeliest])}"}, *ITEMS]
    assert measured(model, items=items).completed[0]


def test_the_cost_of_a_mitigation_that_is_no_plan_can_be_measured(model: Any) -> None:
    before = measured(model)
    with fit_mitigation("self_debias", model, tokenizer=tiny_tokenizer(), prefix="bad rude hate", decay=1000.0).acting(model):
        change = measured(model).minus(before)
    assert change.loss["all"].value != 0 and change.logprob.value != 0


def test_the_shipped_facts_are_sixty_of_five_kinds_without_twins() -> None:
    items = cloze_items()
    assert len(items) == len({item["prompt"] for item in items}) == 60
    assert {item["kind"] for item in items} == {"capital", "opposite", "animal", "number", "nature"}
    assert all(item["answer"].startswith(" ") and not item["prompt"].endswith(" ") for item in items)
    json.dumps(items)


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        ({"a": SOURCES["nature"], "b": SOURCES["talk"]}, {}, "too few sources"),
        ({**SOURCES, "all": ["one two", "two three"]}, {}, "too few sources"),
        ({**SOURCES, "talk": ["hello you"]}, {}, "too few texts"),
        ({**SOURCES, "talk": [*SOURCES["talk"], SOURCES["nature"][0]]}, {}, "twice"),
        ({**SOURCES, "talk": [Row((8, 9), 2), Row((9, 8), 1)]}, {}, "no token to predict"),
        ({**SOURCES, "talk": "hello"}, {}, "talk"),
        (SOURCES, {"items": [{"prompt": "one"}]}, "item 0"),
        (SOURCES, {"items": ITEMS[-1:]}, "too few cloze items"),
    ],
)
def test_what_cannot_be_measured_is_refused(sources: Any, options: dict[str, Any], said: str, model: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        measured(model, sources, **options)


def test_measurements_on_other_texts_are_not_subtracted(model: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be subtracted"):
        measured(model).minus(measured(model, {**SOURCES, "talk": ["hello you", "what is this"]}))


@pytest.mark.real
def test_the_embedded_model_completes_enough_facts_to_lose_some(smollm2: Any) -> None:
    model, tokenizer = smollm2
    texts = {kind: [item["prompt"] for item in cloze_items() if item["kind"] == kind][:2] for kind in ("capital", "animal", "nature")}
    found = side_effects(model, texts, tokenizer=tokenizer)
    assert found.left_out == 0 and 0.40 < found.accuracy < 0.95
