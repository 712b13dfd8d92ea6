"""Measures of edits as metrics: by hand, with an edit that is an arm beside a plan; items without their prompts are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from edits.edit_helpers import random_edit

import steer
from steer.edits import Fact, Located, WeightDelta, edited_maps, read_keys
from steer.edits.make_edit import make_edit
from steer.errors import ConfigError
from steer.experiment.metric import check_items, measured, metric_of, with_ids, with_system
from steer.experiment.scores import Place
from steer.model.anatomy import Anatomy

ITEMS = with_ids(
    [
        {"prompt": f"the {word} is a", "subject": word, "target": "mat", "true": "big house",
         "paraphrases": [f"my {word} is", f"one . the {word} is"], "neighbours": ["the sun is a"]}
        for word in ("cat", "dog", "tree", "star")
    ]
)  # fmt: skip
NAMES = ("edit_efficacy", "edit_paraphrase", "edit_neighbourhood")


def probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    start, ids = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return math.exp(float(logprobs.gather(1, torch.tensor(ids)[:, None]).mean()))


def test_values_by_hand(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    prompts = {"edit_efficacy": lambda item: [item["prompt"]], "edit_paraphrase": lambda item: item["paraphrases"],
               "edit_neighbourhood": lambda item: item["neighbours"]}  # fmt: skip
    for name, of in prompts.items():
        wins, loses = ("true", "target") if name == "edit_neighbourhood" else ("target", "true")
        pairs = [
            [tuple(probability(model, tiny_tokenizer, prompt, item[key]) for key in (wins, loses)) for prompt in of(item)] for item in ITEMS
        ]
        score = [sum(a > b for a, b in of_item) / len(of_item) for of_item in pairs]
        magnitude = [sum(a - b for a, b in of_item) / len(of_item) for of_item in pairs]
        assert list(measured(metric_of(name), model, tiny_tokenizer, ITEMS).values()) == pytest.approx(score)
        found = measured(metric_of({"metric": name, "reads": "magnitude"}), model, tiny_tokenizer, ITEMS)
        assert list(found.values()) == pytest.approx(magnitude, abs=1e-6)


def test_a_system_message_stands_before_every_prompt(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    metric = metric_of({"metric": "edit_efficacy", "reads": "probability"})
    found = measured(metric, model, tiny_tokenizer, with_system(ITEMS, "be nice"))
    assert found[ITEMS[0]["id"]] == pytest.approx(probability(model, tiny_tokenizer, "be nice the cat is a", "mat"), abs=1e-6)
    chat = measured(metric_of({"metric": "edit_efficacy", "reads": "probability", "chat": True}), model, tiny_tokenizer, ITEMS)
    assert chat[ITEMS[0]["id"]] == pytest.approx(probability(model, tiny_tokenizer, "<user> the cat is a <assistant>", "mat"), abs=1e-6)


def test_an_edit_is_an_arm_beside_a_plan(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    plan = steer.Plan(steer.Intervention(steer.Add(torch.ones(32)), "layers.1.output", strength=0.1))
    edit = random_edit(model, size=0.3)
    metric = {"metric": "edit_efficacy", "reads": "probability"}
    result = steer.compare(model, {"plain": None, "edited": edit, "steered": plan}, metric, ITEMS, tokenizer=tiny_tokenizer)
    means = {arm["name"]: arm["outcomes"]["edit_efficacy"]["mean"] for arm in result.metrics["arms"]}
    with edit.applied(model):
        expected = [probability(model, tiny_tokenizer, item["prompt"], item["target"]) for item in ITEMS]
    assert means["edited"] == pytest.approx(sum(expected) / 4, abs=1e-6) and len(set(means.values())) == 3


def test_an_edit_and_a_plan_that_says_the_same_are_arms_with_the_same_outcomes(tiny: Any, tiny_tokenizer: Any) -> None:
    """W k + delta at the end of the subject and W k elsewhere, or delta added there by a plan: one is the other to rounding."""
    model, layer, site = tiny("llama"), 1, "layers.1.mlp.output"
    prompts = (("where is the cat", "cat"), ("i like the dog", "dog"))
    items = with_ids([{"prompt": prompt, "subject": subject, "target": "mat", "true": "sun"} for prompt, subject in prompts])
    facts = [Fact.of(item["prompt"], item["subject"], item["target"], item["true"]) for item in items]
    ids = [tiny_tokenizer(fact.prompt).input_ids for fact in facts]
    tokens = [Located(tuple(row), place, place, 1, False, False) for row in ids for place in range(len(row))]
    keys = read_keys(model, tokens, [layer])[layer].double()  # [tokens, f]
    ends = torch.tensor([float(place.last == 3) for place in tokens], dtype=torch.float64)
    target, true = (tiny_tokenizer(word).input_ids[0] for word in ("mat", "sun"))
    unembedding = model.get_output_embeddings().weight.detach()
    delta = 3.0 * (unembedding[target] - unembedding[true]) / unembedding[target].norm()
    (edited,) = edited_maps(Anatomy.find(model), [layer])
    change = WeightDelta(edited.name, layer, delta[:, None], (torch.linalg.pinv(keys) @ ends)[:, None], keys[ends > 0])
    edit = make_edit(model, facts, [change], editor="by hand", name="mat")
    plan = steer.Plan(steer.Intervention(steer.Add(delta), site, scope="positions[3]"))
    arms = {"plain": None, "edited": edit, "steered": plan}
    outcomes = {}
    for reads in ("score", "probability"):
        metric = {"metric": "edit_efficacy", "reads": reads}
        result = steer.compare(model, arms, metric, items, tokenizer=tiny_tokenizer)
        outcomes[reads] = {name: result.scores[Place("edit_efficacy", name, 0, 0)] for name in arms}
    edited_p, steered_p, plain_p = (outcomes["probability"][name] for name in ("edited", "steered", "plain"))
    assert edited_p == pytest.approx(steered_p, abs=1e-5) and all(p > 1.5 * plain_p[item] for item, p in edited_p.items())
    assert outcomes["score"]["edited"] == outcomes["score"]["steered"]


def test_items_without_prompts_are_refused() -> None:
    for name, key in zip(NAMES, ("true", "paraphrases", "neighbours"), strict=True):
        check_items(metric_of(name), ITEMS)
        for wrong in (None, [], [" "], 3):
            with pytest.raises(ConfigError):
                check_items(metric_of(name), [{**ITEMS[0], key: wrong}])
    check_items(metric_of({"metric": "edit_efficacy", "reads": "accuracy"}), [{**ITEMS[0], "true": ""}])
    with pytest.raises(ConfigError, match="reads"):
        metric_of({"metric": "edit_efficacy", "reads": "nonsense"})
