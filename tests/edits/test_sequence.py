"""Edits in sequence: each on top of those before, whole or not at all, and watched."""

from __future__ import annotations

import pytest
import torch
from edits.edit_helpers import CONTEXTS, FACTS, equal_weights, model_of, running_text, weights_of
from tiny_tokenizer import WORDS, tiny_tokenizer

from steer.edits import Covariance, EditBench, Fact, Guards, ValueSettings, apply_in_sequence, edit_facts, fact_keys
from steer.edits.edited_weights import EditedWeights
from steer.edits.editors.alphaedit import AlphaEdit
from steer.edits.editors.emmet import EMMET
from steer.edits.editors.memit import MEMIT
from steer.edits.locate import answer_row
from steer.errors import EditError
from steer.model.likelihood import response_logprobs

TOKENIZER = tiny_tokenizer()
FAST = ValueSettings(steps=6, clamp=3.0, kl=0.0, weight_decay=0.0)
ONE_STEP = ValueSettings(steps=2, clamp=1.0, kl=0.0, weight_decay=0.0)
OPEN = Guards(drift=None, neutral_kl=None)
AT_ITS_END = tuple(
    Fact.of("where is the {}", subject, target) for subject, target in (("dog", "house"), ("cold moon", "day"), ("cat", "star"))
)


@pytest.fixture(scope="module")
def covariance(tmp_path_factory):
    return Covariance.fit(model_of("llama"), TOKENIZER, running_text(20), [0, 1], folder=tmp_path_factory.mktemp("c"), progress=False)


def in_sequence(model, covariance, facts=AT_ITS_END, editor=None, guards=OPEN, **options):
    editor = editor or MEMIT(value_settings=FAST, ridge=0.01)
    return apply_in_sequence(
        model, TOKENIZER, list(facts), editor=editor, layers=[0], covariance=covariance, contexts=CONTEXTS, guards=guards, **options
    )


def probabilities(model, facts):
    return response_logprobs(model, [answer_row(TOKENIZER, fact.prompt, fact.target) for fact in facts], pad=0).exp()


def test_a_sequence_is_one_edit_after_the_other(covariance):
    model, other = model_of("llama"), model_of("llama")
    before = weights_of(model)
    result = in_sequence(model, covariance)
    edited = EditedWeights.of(other)
    for number, fact in enumerate(AT_ITS_END):
        made = edit_facts(
            other, TOKENIZER, fact, editor=MEMIT(value_settings=FAST, ridge=0.01), layers=[0], covariance=covariance, contexts=CONTEXTS,
            guards=OPEN, name=result.edits[number].name,
        )  # fmt: skip
        edited.apply(made)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], atol=1e-6, rtol=1e-5)
    assert [edit.facts for edit in result.edits] == [(fact,) for fact in AT_ITS_END] and result.stopped is None
    assert EditedWeights.of(model).applied == result.edits and "3 edits of 3 facts" in str(result)
    EditedWeights.of(model).clear()
    assert equal_weights(model, before)


def test_past_keys_protect_what_was_written(covariance):
    kept = []
    for keeps_past in (False, True):
        model = model_of("llama")
        in_sequence(model, covariance, AT_ITS_END[:1], MEMIT(value_settings=FAST, ridge=0.01, keeps_past=keeps_past))
        key = fact_keys(model, TOKENIZER, list(AT_ITS_END[:1]), CONTEXTS, [0])[0].combined
        (edit,) = in_sequence(model, covariance, AT_ITS_END[1:2], MEMIT(value_settings=FAST, ridge=0.01, keeps_past=keeps_past)).edits
        kept.append(float((key @ edit.deltas[0].change().T).norm()))
    assert kept[1] < 0.1 * kept[0]


def test_past_keys_are_extended_and_begun_anew(covariance):
    model = model_of("llama")
    bench = EditBench(model, TOKENIZER, [0], CONTEXTS, covariance=covariance)
    metric = bench.factor(0).solve
    nothing = torch.zeros(1, 64)
    assert bench.past_keys(0, metric, "c", nothing) is None
    first, second = in_sequence(model, covariance, AT_ITS_END[:2]).edits
    past = bench.past_keys(0, metric, "c", nothing)
    torch.testing.assert_close(past.keys.T, torch.cat([first.deltas[0].keys, second.deltas[0].keys]).double())
    torch.testing.assert_close(past.gram, past.keys.T @ metric(past.keys))
    EditedWeights.of(model).revert(first)
    torch.testing.assert_close(bench.past_keys(0, metric, "c", nothing).keys.T, second.deltas[0].keys.double())
    assert bench.past_keys(0, metric, "c", second.deltas[0].keys).keys.shape[1] == 0


@pytest.mark.parametrize("editor", [MEMIT(value_settings=FAST, ridge=0.01), AlphaEdit(value_settings=FAST), EMMET(value_settings=FAST)])
def test_the_last_edit_of_a_fact_wins(covariance, editor):
    model = model_of("llama")
    again = AT_ITS_END[0].with_target("star")
    result = in_sequence(model, covariance, (AT_ITS_END[0], again), editor, batch=2)
    old, new = probabilities(model, [AT_ITS_END[0], again])
    assert len(result.edits) == 2 and new > old
    EditedWeights.of(model).revert(result.edits[0])
    only = model_of("llama")
    EditedWeights.of(only).apply(result.edits[1])
    assert equal_weights(model, weights_of(only))


def test_batches_are_edits_of_several_facts(covariance):
    model = model_of("llama")
    result = in_sequence(model, covariance, (*FACTS, *AT_ITS_END[1:]), batch=2, name="run")
    assert [len(edit.facts) for edit in result.edits] == [2, 2, 1]
    assert [edit.name for edit in result.edits] == ["run-00001", "run-00002", "run-00003"]
    (more,) = in_sequence(model, covariance, [AT_ITS_END[0].with_target("sun")], name="run").edits
    assert more.name == "run-00004"


def test_a_guard_ends_a_sequence_before_the_edit_that_is_beyond_it(covariance):
    free = model_of("llama")
    drifts = [edit.provenance["readings"][0]["drift"] for edit in in_sequence(free, covariance).edits]
    limit = max(drifts[0], 1e-9) * 1.0001 if max(drifts) > drifts[0] else min(drifts)
    first = next(i for i, drift in enumerate(drifts) if drift > limit)
    model = model_of("llama")
    result = in_sequence(model, covariance, guards=Guards(drift=limit, neutral_kl=None, mode="stop"))
    assert len(result.edits) == first and result.stopped.facts == (AT_ITS_END[first].name,)
    assert result.not_reached == AT_ITS_END[first:] and AT_ITS_END[first].prompt in str(result)
    assert EditedWeights.of(model).applied == result.edits


def test_a_guard_leaves_an_edit_out_and_goes_on(covariance):
    model = model_of("llama")
    before = weights_of(model)
    result = in_sequence(model, covariance, guards=Guards(drift=0.0, neutral_kl=None, mode="roll_back"))
    assert result.edits == () and result.left_out == AT_ITS_END and equal_weights(model, before)


def test_neutral_text_is_compared_with_the_model_before_the_first_edit(covariance):
    model = model_of("llama")
    guards = Guards(drift=None, neutral_kl=None, neutral_texts=tuple(running_text(13, seed=3)))
    divergences = [edit.provenance["readings"][0]["neutral_kl"] for edit in in_sequence(model, covariance, guards=guards).edits]
    alone = model_of("llama")
    (edit,) = in_sequence(alone, covariance, AT_ITS_END[:1], guards=guards).edits
    assert edit.provenance["readings"][0]["neutral_kl"] == pytest.approx(divergences[0]) and len(set(divergences)) == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_leaves_whole_edits(monkeypatch, covariance, error):
    model = model_of("llama")
    calls = []

    def failing(self, *args, whole=EditBench.values):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return whole(self, *args)

    monkeypatch.setattr(EditBench, "values", failing)
    with pytest.raises(error):
        in_sequence(model, covariance)
    edited = EditedWeights.of(model)
    assert len(edited.applied) == 2 and edited.changed == []


def subjects(count):
    return [f"{a} {b} {c}" for a in WORDS[:20] for b in WORDS[20:30] for c in WORDS[40:46]][:count]


@pytest.mark.parametrize("batch", [1, 30])
def test_many_edits_go_in_and_come_out(covariance, batch):
    model = model_of("llama")
    before = weights_of(model)
    facts = [Fact.of("i tell you of the {}", subject, WORDS[50 + i % 20]) for i, subject in enumerate(subjects(60))]
    result = in_sequence(model, covariance, facts, MEMIT(value_settings=ONE_STEP), batch=batch)
    assert sum(len(edit.facts) for edit in result.edits) == 60
    EditedWeights.of(model).clear()
    assert equal_weights(model, before)


@pytest.mark.slow
def test_a_thousand_edits_go_in_and_come_out(covariance):
    model = model_of("llama")
    before = weights_of(model)
    facts = [Fact.of("i tell you of the {}", subject, WORDS[50 + i % 20]) for i, subject in enumerate(subjects(1000))]
    result = in_sequence(model, covariance, facts, MEMIT(value_settings=ONE_STEP))
    assert len(result.edits) == 1000
    EditedWeights.of(model).clear()
    assert equal_weights(model, before)


def test_one_prompt_of_two_subjects_is_two_batches(covariance):
    model = model_of("llama")
    prompt = "the dog and the cat is"
    facts = [Fact(prompt, "dog", "house"), Fact(prompt, "cat", "sun")]
    result = in_sequence(model, covariance, facts, MEMIT(value_settings=ONE_STEP), batch=2)
    assert [edit.facts for edit in result.edits] == [(facts[0],), (facts[1],)]


def test_nothing_to_edit_and_odd_batches_are_refused(covariance):
    with pytest.raises(EditError, match="nothing"):
        in_sequence(model_of("llama"), covariance, [])
    with pytest.raises(ValueError, match="batch"):
        in_sequence(model_of("llama"), covariance, batch=0)
