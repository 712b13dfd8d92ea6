"""Guards: each reading is the formula, and each mode does what it says about the fact that is beyond a limit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from edits.edit_helpers import CONTEXTS, FACTS, equal_weights, model_of, running_text, weights_of
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.edits import (
    Covariance,
    EditBench,
    GuardReading,
    Guards,
    GuardWarning,
    ValueSettings,
    edit_facts,
)
from steer.edits.edited_weights import EditedWeights
from steer.edits.editors.lora import LoRA
from steer.edits.editors.memit import MEMIT
from steer.edits.guards import NeutralTexts
from steer.errors import ConfigError, GuardError

TOKENIZER = tiny_tokenizer()
TEXTS = running_text(20)
STRONG = MEMIT(value_settings=ValueSettings(steps=4, clamp=3.0, kl=0.0, weight_decay=0.0), ridge=1.0)
NO_LIMITS = Guards(drift=None, neutral_kl=None)


@pytest.fixture(scope="module")
def covariance(tmp_path_factory):
    return Covariance.fit(model_of("llama"), TOKENIZER, TEXTS, [0, 1], folder=tmp_path_factory.mktemp("c"), progress=False)


def edit(model, covariance, facts=FACTS, guards=NO_LIMITS, editor=STRONG, **options):
    return edit_facts(
        model, TOKENIZER, list(facts), editor=editor, layers=[0], covariance=covariance, contexts=CONTEXTS, guards=guards, **options
    )


def readings(made):
    return made.provenance["readings"]


def test_drift_is_the_covariance_weighted_change_of_each_fact(covariance):
    model = model_of("llama")
    made = edit(model, covariance)
    (delta,) = made.deltas
    weight, moment = model.model.layers[0].mlp.down_proj.weight.detach().double(), covariance.moment(0)
    power = (weight @ moment * weight).sum()
    for number, reading in enumerate(readings(made)):
        part = torch.outer(delta.u[:, number], delta.v[:, number]).double()
        assert reading["drift"] == pytest.approx(float(((part @ moment * part).sum() / power).sqrt()), rel=1e-4)
        assert 0 < reading["strength"] < 1 and reading["key_cosine"] is None and reading["neutral_kl"] is None
    dense = edit(model, None, editor=LoRA(steps=2))
    assert {reading["drift"] for reading in readings(dense)} == {None}
    whole = edit(model, covariance, editor=LoRA(steps=2))
    change = whole.deltas[0].change().double()
    assert readings(whole)[0]["drift"] == pytest.approx(float(((change @ moment * change).sum() / power).sqrt()), rel=1e-4)


def test_the_value_is_compared_with_what_the_map_gives_for_ordinary_keys(covariance):
    model = model_of("llama")
    weight = model.model.layers[0].mlp.down_proj.weight.detach().double()
    usual = (weight @ covariance.moment(0) * weight).sum().sqrt()
    values = EditBench(model, TOKENIZER, [0], CONTEXTS).values(list(FACTS), 0, STRONG.value_settings)
    for value, reading in zip(values, readings(edit(model, covariance)), strict=True):
        assert reading["value_ratio"] == pytest.approx(float((value.written + value.delta).norm() / usual), rel=1e-4)
    with edit(model, covariance, FACTS[:1], name="large").applied(model):  # which is no part of what is usual
        bench = EditBench(model, TOKENIZER, [0], CONTEXTS, covariance=covariance)
        assert bench.output_power(0) == pytest.approx(float(usual) ** 2, rel=1e-4)


def test_a_bias_is_no_part_of_what_is_written(tmp_path):
    model = FAMILIES["gpt2"]()
    torch.nn.init.constant_(model.transformer.h[0].mlp.c_proj.bias, 100.0)
    covariance = Covariance.fit(model, TOKENIZER, TEXTS, [0], folder=tmp_path, progress=False)
    assert 0 < readings(edit(model, covariance))[0]["value_ratio"] < 50


def test_keys_are_compared_with_those_of_the_edits_before(covariance):
    model = model_of("llama")
    first = edit(model, covariance, FACTS[:1], name="first")
    with first.applied(model):
        same, other = (readings(edit(model, covariance, [fact]))[0] for fact in (FACTS[0].with_target("sun"), FACTS[1]))
    assert same["key_cosine"] == pytest.approx(1, abs=1e-5) and same["nearest"] == "first"
    assert other["key_cosine"] < 0.99


def test_neutral_text_is_read_before_and_with_the_edit(covariance):
    model = model_of("llama")
    made = edit(model, covariance, guards=Guards(drift=None, neutral_kl=None, neutral_texts=tuple(TEXTS)))
    neutral = NeutralTexts(EditBench(model, TOKENIZER, [0], CONTEXTS), TEXTS)
    assert sum(map(len, neutral.before)) == 256 and neutral.kl() == pytest.approx(0, abs=1e-6)
    with made.applied(model):
        assert neutral.kl() == pytest.approx(readings(made)[0]["neutral_kl"], rel=1e-3)
    ids = torch.tensor([TOKENIZER(TEXTS[0]).input_ids])
    before = model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(neutral.before[0], before, atol=1e-5, rtol=1e-5)
    kl = neutral_kl_of_256_tokens(model, made)
    assert kl > 1e-4 and readings(made)[0]["neutral_kl"] == pytest.approx(kl, rel=1e-3)


@torch.no_grad()
def neutral_kl_of_256_tokens(model, made):
    """KL(before || with the edit), mean over tokens, by plain passes over each text."""
    rows, left = [], 256
    for text in TEXTS:
        rows.append(TOKENIZER(text).input_ids[: min(64, left)])
        left -= len(rows[-1])
        if not left:
            break
    before = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
    with made.applied(model):
        after = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
    divergences = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(divergences).mean())


def test_a_guard_warns_stops_or_leaves_the_fact_out(covariance):
    model = model_of("llama")
    before = weights_of(model)
    drifts = [reading["drift"] for reading in readings(edit(model, covariance))]
    worst = drifts.index(max(drifts))
    limit = sum(sorted(drifts)[1:]) / 2
    assert sum(drift > limit for drift in drifts) == 1
    with pytest.warns(GuardWarning, match=FACTS[worst].prompt):
        warned = edit(model, covariance, guards=Guards(drift=limit, mode="warn"))
    assert warned.facts == FACTS and readings(warned)[worst]["beyond"] == ["drift"]
    with pytest.raises(GuardError, match=FACTS[worst].prompt) as caught:
        edit(model, covariance, guards=Guards(drift=limit, mode="stop"))
    assert caught.value.facts == (FACTS[worst].name,)
    kept = edit(model, covariance, guards=Guards(drift=limit, mode="roll_back"))
    rest = tuple(fact for fact in FACTS if fact is not FACTS[worst])
    assert kept.facts == rest and [reading["fact"] for reading in kept.provenance["left_out"]] == [FACTS[worst].name]
    again = edit(model, covariance, rest)
    torch.testing.assert_close(kept.deltas[0].change(), again.deltas[0].change(), atol=1e-6, rtol=1e-4)
    with pytest.raises(GuardError, match="no fact"):
        edit(model, covariance, guards=Guards(drift=0.0, mode="roll_back"))
    assert equal_weights(model, before)


@pytest.mark.parametrize(
    ("limits", "beyond"),
    [
        ({"strength": 0.999}, "strength"),
        ({"neutral_kl": 0.0, "neutral_texts": tuple(TEXTS)}, "neutral_kl"),
        ({"value_ratio": 0.01}, "value_ratio"),
    ],
)
def test_each_limit_stops(covariance, limits, beyond):
    with pytest.raises(GuardError, match=beyond):
        edit(model_of("llama"), covariance, guards=Guards(**{"drift": None, "neutral_kl": None, "mode": "stop", **limits}))


def test_the_cosine_stops_a_second_edit_of_a_subject(covariance):
    model = model_of("llama")
    EditedWeights.of(model).apply(edit(model, covariance, FACTS[:1]))
    with pytest.raises(GuardError, match="key_cosine"):
        edit(model, covariance, [FACTS[0].with_target("sun")], guards=Guards(key_cosine=0.99, drift=None, mode="stop"))


def test_a_reading_that_is_no_number_is_beyond_its_limit():
    guards = Guards(neutral_kl=0.1)
    assert guards.beyond(GuardReading("a", neutral_kl=math.nan)) == ("neutral_kl",)
    assert guards.beyond(GuardReading("a")) == ()
    assert Guards(strength=0.5).beyond(GuardReading("a", strength=0.4, neutral_kl=0.2)) == ("strength", "neutral_kl")


def test_readings_and_settings_go_into_a_file(covariance, tmp_path):
    made = edit(model_of("llama"), covariance, guards=Guards(mode="warn", drift=10.0))
    json.dumps([readings(made), made.settings])
    made.save(tmp_path / "edit")
    assert made.settings["guards"]["drift"] == 10.0 and str(GuardReading("a", drift=0.5)) == "drift 0.5"


def test_limits_and_modes_out_of_range_are_refused():
    for bad in ({"drift": -1}, {"mode": "halt"}, {"neutral_texts": ["a"]}, {"strength": "much"}):
        with pytest.raises(ConfigError):
            Guards(**bad)
