"""What people try first: one fact instead of a list, text instead of a list, inference mode, copies of an edited model."""

from __future__ import annotations

import copy

import pytest
import torch
from edits.edit_helpers import random_edit, running_text
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.edits import (
    Contexts,
    Covariance,
    Edit,
    EditedWeights,
    Fact,
    FactRecord,
    ValueSettings,
    causal_trace,
    edit_facts,
    evaluate_edits,
    fact_keys,
)
from steer.edits.editors.memit import MEMIT
from steer.errors import ConfigError, EditError
from steer.training.edit_readings import target_probability

MODEL = FAMILIES["llama"](num_hidden_layers=2)
TOKENIZER = tiny_tokenizer()
FACT = Fact.of("the food of {} is", "my big dog", "water", true="fire")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    covariance = Covariance.fit(MODEL, TOKENIZER, running_text(40), layers=[1], folder=tmp_path_factory.mktemp("covariance"))
    return {
        "editor": MEMIT(value_settings=ValueSettings(weight_decay=1e-3)),
        "layers": [1],
        "contexts": Contexts(("the sun is warm",)),
        "covariance": covariance,
    }


def test_inference_mode_changes_nothing(options):
    plain = edit_facts(MODEL, TOKENIZER, FACT, **options)
    with torch.inference_mode():
        edit = edit_facts(MODEL, TOKENIZER, FACT, **options)
    assert edit.digest == plain.digest


def test_autocast_changes_nothing(options):
    said = Fact.of(
        FACT.prompt, FACT.subject, TOKENIZER.decode(MODEL(torch.tensor([TOKENIZER(FACT.prompt).input_ids])).logits[0, -1].argmax())
    )

    def made():
        keys = fact_keys(MODEL, TOKENIZER, [FACT], options["contexts"], [1])[1].combined
        probability = target_probability(MODEL, TOKENIZER, [plain])
        restored = causal_trace(MODEL, TOKENIZER, said, samples=2, progress=False)[0].restored
        return edit_facts(MODEL, TOKENIZER, FACT, **options).digest, keys, probability, restored

    plain = edit_facts(MODEL, TOKENIZER, FACT, **options)
    expected = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made()
    assert found[0] == expected[0] == plain.digest and found[2] == expected[2]
    assert torch.equal(found[1], expected[1]) and torch.equal(found[3], expected[3])


def test_what_is_no_model_is_named(options):
    for model in ("gpt2", None):
        with pytest.raises(ConfigError, match="the model"):
            edit_facts(model, TOKENIZER, FACT, **options)
        with pytest.raises(ConfigError, match="the model"):
            causal_trace(model, TOKENIZER, FACT)


def test_a_prompt_beyond_the_positions_of_a_model_is_refused():
    model = FAMILIES["gpt2"](n_positions=16)
    long = Fact("the sun is warm and " * 5 + "the dog is a", "dog", "mat")
    for attempt in (
        lambda: edit_facts(model, TOKENIZER, long, editor="lora", layers=[0], contexts=Contexts(())),
        lambda: fact_keys(model, TOKENIZER, [long], Contexts(()), [0]),
        lambda: causal_trace(model, TOKENIZER, long, progress=False),
    ):
        with pytest.raises(ConfigError, match=r"longer than the model can read[\s\S]*at most 16 tokens"):
            attempt()


@pytest.mark.parametrize("name", ["contexts", "covariance", "guards"])
def test_other_things_than_an_edit_takes_are_named(options, name):
    with pytest.raises(ConfigError, match=f"the {name} of an edit"):
        edit_facts(MODEL, TOKENIZER, FACT, **{**options, name: ("the sun is warm",)})


def test_edits_that_do_nothing_have_names_of_their_own():
    first, second = (Edit((fact,), "memit", ()) for fact in (FACT, FACT.with_target("fire")))
    assert first.name != second.name and first.name == Edit((FACT,), "memit", ()).name


def test_one_fact_is_enough(options):
    found = evaluate_edits(MODEL, TOKENIZER, FACT, options["editor"], **{k: v for k, v in options.items() if k != "editor"}, progress=False)
    assert len(found.rows) == 1
    said = TOKENIZER.decode([int(MODEL(**TOKENIZER(FACT.prompt, return_tensors="pt")).logits[0, -1].argmax())])
    assert (
        len(causal_trace(MODEL, TOKENIZER, Fact.of(FACT.prompt, FACT.subject, said), kinds="hidden", samples=1, progress=False).traces) == 1
    )


def test_text_is_no_list_of_texts(options):
    with pytest.raises(ConfigError, match="the paraphrases of a record"):
        FactRecord(FACT, paraphrases="what is the food of my big dog ?")
    with pytest.raises(ConfigError, match="one of the locality of a record"):
        FactRecord(FACT, locality=("what is the food ?",))
    assert FactRecord(FACT, neighbours=["the food of the cat is"]).neighbours == ("the food of the cat is",)
    with pytest.raises(ConfigError, match="neutral texts"):
        evaluate_edits(MODEL, TOKENIZER, [FACT], "memit", neutral="the sun is warm")


def test_a_copy_of_an_edited_model_is_told_of_its_edit():
    edit = random_edit(MODEL, "a", layers=(1,), seed=0)
    with edit.applied(MODEL):
        copied = copy.deepcopy(MODEL)
    edited = EditedWeights.of(copied)
    with pytest.raises(EditError, match=r"adopt\(\[edit\]\)"):
        edited.revert(edit)
    edited.adopt([edit])
    edited.revert(edit)
    path = edit.deltas[0].path
    torch.testing.assert_close(copied.get_submodule(path).weight, MODEL.get_submodule(path).weight)
