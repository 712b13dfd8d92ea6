"""Editors in models of all kinds: a fact is written where it was asked for, odd facts are told, and nothing else of a model changes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from edits.edit_helpers import CONTEXTS, DENSE, FACTS, equal_weights, model_of, weights_of
from edits.editor_helpers import (
    STRONG,
    TEXTS,
    TOKENIZER,
    UNSAID,
    covariance_of,
    edit,
    fitted,
    keys_of,
    probabilities,
    values_of,
)
from edits.test_edited_map import Int8
from method_tables import check_table

import steer
from steer.edits import (
    EDITORS,
    CollinearKeysWarning,
    Contexts,
    Covariance,
    EditBench,
    Fact,
    Guards,
    ValueSettings,
    ValueStore,
    WeakValueWarning,
    already_said,
    edit_facts,
    preparation,
)
from steer.edits.edited_weights import EditedWeights
from steer.edits.editor import ValueEditor
from steer.edits.editors.alphaedit import AlphaEdit
from steer.edits.editors.constrained_ft import ConstrainedFT
from steer.edits.editors.emmet import EMMET
from steer.edits.editors.lora import LoRA
from steer.edits.editors.memit import MEMIT
from steer.edits.editors.pmet import PMET
from steer.edits.editors.r_rome import RROME
from steer.edits.editors.rome import ROME
from steer.edits.locate import answer_row
from steer.edits.running_text import shipped_texts
from steer.edits.solve import solve_keys
from steer.errors import ConfigError, ConflictingEditsError, EditError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.likelihood import response_logprobs
from steer.model.prefix import PROVEN
from steer.model.tied import tied_head

# ---- every editor

# with settings under which the tiny model learns a fact
STRONG_EDITORS = {
    "alphaedit": AlphaEdit(value_settings=STRONG, ridge=0.01),
    "constrained_ft": ConstrainedFT(epsilon=0.05, lr=0.01),
    "emmet": EMMET(value_settings=STRONG),
    "lora": LoRA(steps=20),
    "memit": MEMIT(value_settings=STRONG, ridge=0.01),
    "pmet": PMET(value_settings=replace(STRONG, with_attention=True), ridge=0.01),
    "r_rome": RROME(value_settings=STRONG),
    "rome": ROME(value_settings=STRONG),
}


def test_every_editor_has_settings_for_these_tests():
    check_table(
        EDITORS, STRONG_EDITORS, "STRONG_EDITORS of tests/edits/test_editors.py", "an editor with which the tiny model learns a fact"
    )


@pytest.mark.parametrize("name", STRONG_EDITORS)
def test_every_editor_makes_a_fact_likelier_and_leaves_the_model_alone(name):
    model = model_of("llama")
    before, said = weights_of(model), probabilities(model, FACTS[1:2])
    made = edit(model, FACTS[1:2], STRONG_EDITORS[name])
    assert equal_weights(model, before) and made.editor == name and made.rank
    with made.applied(model):
        assert probabilities(model, FACTS[1:2]) > said
    assert equal_weights(model, before)


# ---- in all kinds of models


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("editor", [ROME(value_settings=STRONG), MEMIT(value_settings=STRONG, ridge=0.01), EMMET(value_settings=STRONG)])
def test_a_fact_is_written_where_it_was_asked_for_and_nothing_else_changes(family, editor):
    model, fact = model_of(family), FACTS[1:2]
    before, said = weights_of(model), probabilities(model, fact)
    made = edit(model, fact, editor, family=family)
    assert equal_weights(model, before)
    (delta,) = made.deltas
    (wanted,) = values_of(model, facts=fact)
    strength = made.provenance["readings"][0]["strength"]
    torch.testing.assert_close(keys_of(model, facts=fact) @ delta.change().double().T, strength * wanted[None], atol=1e-5, rtol=1e-4)
    with made.applied(model):
        changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
        assert changed == [f"{delta.path}.weight"] and probabilities(model, fact) > said
    assert equal_weights(model, before)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("name", ["alphaedit", "constrained_ft", "lora", "pmet", "r_rome"])
def test_the_other_editors_change_the_down_projection_alone_too(family, name):
    """In few steps: what they write is told by their formulas."""
    model, editor = model_of(family), STRONG_EDITORS[name]
    few = {"steps": 3} if hasattr(editor, "steps") else {"value_settings": replace(editor.value_settings, steps=3)}
    before = weights_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeakValueWarning)
        made = edit(model, FACTS[1:2], replace(editor, **few), family=family)
    assert equal_weights(model, before) and made.rank
    with made.applied(model):
        changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
        assert changed == [f"{delta.path}.weight" for delta in made.deltas]
    assert equal_weights(model, before)


def test_a_change_in_the_weights_does_what_it_does_beside_them():
    for family in ("llama", "gpt2", "gemma2"):
        model = model_of(family)
        made = edit(model, family=family, editor=EMMET(value_settings=STRONG), layers=[0])
        bench = EditBench(model, TOKENIZER, [0], CONTEXTS)
        with bench.beside(made.deltas):
            beside = probabilities(model)
        with made.applied(model):
            torch.testing.assert_close(probabilities(model), beside, rtol=1e-4, atol=1e-6)


def test_embeddings_that_are_tied_stay_as_they_are():
    model = model_of("llama", tie_word_embeddings=True)
    assert tied_head(Anatomy.find(model)) is not None
    head = model.lm_head.weight.clone()
    covariance = fitted(model, [0])
    with edit(model, editor="emmet", covariance=covariance).applied(model):
        assert torch.equal(model.lm_head.weight, head) and model.lm_head.weight is model.model.embed_tokens.weight


def test_half_precision_says_what_rounding_costs():
    model = model_of("llama").to(torch.bfloat16)
    covariance = fitted(model, [0])
    before = probabilities(model)
    made = edit(model, editor=EMMET(value_settings=STRONG), covariance=covariance)
    assert made.deltas[0].u.dtype == torch.float32
    with made.applied(model) as edited:
        assert bool((probabilities(model) > before).all()) and 0 < max(edited.rounding.values()) < 0.2


def test_under_an_adapter_it_is_the_weight_below_that_is_edited():
    model = model_of("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
    covariance = fitted(adapted, [0])
    before = probabilities(adapted)
    made = edit(adapted, editor=EMMET(value_settings=STRONG), covariance=covariance)
    assert made.deltas[0].path == "model.layers.0.mlp.down_proj"
    keys = keys_of(adapted)
    torch.testing.assert_close(keys @ made.deltas[0].change().double().T, values_of(adapted), atol=1e-5, rtol=1e-4)
    with made.applied(adapted):
        assert bool((probabilities(adapted) > before).all())


def test_a_quantised_map_gets_an_edit_that_stays_beside_it():
    model = model_of("llama")
    model.model.layers[0].mlp.down_proj = Int8(model.model.layers[0].mlp.down_proj)
    covariance = fitted(model, [0])
    before = probabilities(model)
    made = edit(model, editor=EMMET(value_settings=STRONG), covariance=covariance)
    with EditBench(model, TOKENIZER, [0], CONTEXTS).beside(made.deltas):
        assert bool((probabilities(model) > before).all())
    with pytest.raises(EditError):
        EditedWeights.of(model).apply(made)


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(EditError, match="down projection"):
        edit_facts(model_of("mixtral"), TOKENIZER, FACTS[0], layers=[0], contexts=CONTEXTS, covariance=covariance_of("llama"))


# ---- odd facts


def test_what_the_model_says_already_is_reported_and_not_written():
    model = model_of("llama")
    ids = torch.tensor([answer_row(TOKENIZER, FACTS[2].prompt, "dog").ids[:-1]])
    said = FACTS[2].with_target(TOKENIZER.decode(model(ids).logits[0, -1].argmax()))
    assert already_said(model, TOKENIZER, [said]) == [True]
    for name in ("rome", "memit", "alphaedit", "lora"):
        made = edit(model, [said], name)
        assert made.rank == 0 and made.deltas == () and made.provenance["no_op"] == [said.name] and made.facts == (said,)
    mixed = edit(model, [said, FACTS[1]], MEMIT(value_settings=STRONG))
    assert mixed.rank == 1 and mixed.provenance["no_op"] == [said.name]


@pytest.mark.parametrize("editor", ["memit", "lora"])
def test_words_that_the_tokenizer_does_not_know_are_refused(editor):
    model = model_of("llama")
    with pytest.raises(EditError, match="does not know the target"):
        edit(model, [FACTS[0].with_target("mat Quito")], editor)
    with pytest.raises(EditError, match="does not know the end of the subject"):
        edit(model, [Fact.of("the {} sat on the", "cat Quito", "mat")], editor)
    edit(model, [Fact.of("the {} sat on the", "Quito cat", "mat")], editor)  # the key is that of a word that it knows


def test_two_targets_of_one_prompt_are_a_conflict():
    with pytest.raises(ConflictingEditsError, match="mat.*dog|dog.*mat"):
        edit(model_of("llama"), [FACTS[0], FACTS[0].with_target("dog")])


def test_facts_that_share_a_key_are_an_error_or_a_warning_that_names_both():
    model = model_of("llama")
    facts = [Fact.of("the {} sat on the", "red cat", "mat"), Fact.of("the {} ran in the", "red cat", "house")]
    plain = Contexts(())
    with pytest.raises(EditError, match="sat on the.*ran in the"):
        edit(model, facts, EMMET(value_settings=STRONG), contexts=plain)
    with pytest.warns(CollinearKeysWarning, match="sat on the.*ran in the"):
        made = edit(model, facts, MEMIT(value_settings=STRONG), contexts=plain)
    assert made.rank == 2
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(2, 20, generator=generator)
    keys = torch.cat([independent, independent.sum(0, keepdim=True)])
    with pytest.raises(EditError, match="not independent"):
        solve_keys(keys, torch.randn(3, 6, generator=generator), lambda k: k, 0.0)


def test_a_value_that_was_not_found_is_a_warning():
    model = model_of("llama")
    nothing = ValueSettings(steps=1)
    with pytest.warns(WeakValueWarning, match="red cat"):
        made = edit(model, FACTS[:1], MEMIT(value_settings=nothing))
    assert made.rank == 0 and made.provenance["no_op"] == []


def test_an_edit_whose_rank_is_that_of_the_matrix_is_stored_densely():
    model = model_of("llama")
    subjects = [f"{a} {b}" for a in ("red", "blue", "big", "small", "old", "nice") for b in ("cat", "dog", "tree", "fish", "sun", "star")]
    facts = [Fact.of("where is the {}", subject, "house") for subject in subjects if "old" not in subject and "fish" not in subject]
    few = ValueSettings(steps=2, clamp=3.0, kl=0.0, weight_decay=0.0)
    many = facts + [Fact.of("i like the {}", f"cold {fact.subject}", "day") for fact in facts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = edit(model, many, MEMIT(value_settings=few, ridge=1.0))
    (delta,) = made.deltas
    assert len(many) > 32 and delta.is_dense and delta.rank == 32 and len(delta.keys) <= len(many)


# ---- the call


def test_editors_are_registered_with_what_they_are():
    for name, first_line in EDITORS.table():
        assert first_line and EDITORS.get(name).name == name
        settings = EDITORS.get(name)().settings()
        takes_values = issubclass(EDITORS.get(name), ValueEditor)
        assert takes_values is (name not in ("lora", "constrained_ft")) and ("value_settings" in settings) is takes_values
        assert ("weighting" in settings) is takes_values  # with which keys are read again in training
        if not takes_values:
            with pytest.raises(TypeError, match="value_settings"):
                EDITORS.get(name)(value_settings=STRONG)
    with pytest.raises(ConfigError, match="memit"):
        edit(model_of("llama"), editor="mimit")
    for bad in ({"ridge": 0}, {"weighting": "half"}, {"keeps_past": 1}):
        with pytest.raises(ConfigError):
            MEMIT(**bad)


def test_values_are_shared_between_editors():
    model, store = model_of("llama"), ValueStore()
    for name in ("rome", "memit", "emmet", "alphaedit", "r_rome"):
        edit(model, editor=name, values=store)
    assert len(store) == 3 and store.found == 12


def test_a_covariance_has_to_be_of_this_model():
    model = model_of("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(WrongModelError):
        edit(model)
    with pytest.raises(EditError, match="several|one layer|edits one"):
        edit(model_of("llama"), editor="rome", layers=[0, 1])


def test_a_covariance_is_fitted_where_none_is_given_and_read_the_next_time(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(preparation, "shipped_texts", lambda: TEXTS)
    model = model_of("llama")
    given = edit(model, UNSAID)
    fitted = edit(model, UNSAID, covariance=None)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "covariance").iterdir()}
    assert fitted.digest == given.digest and fitted.provenance["layers_from"] == "given" and len(files) == 1
    assert repr(given).endswith("tokens: given)") and repr(fitted).endswith("tokens: text that ships with the library)")
    assert fitted.provenance["covariance"]["data"] == given.provenance["covariance"]["data"]  # here the same texts
    assert "covariance" not in edit(model, UNSAID, editor="lora", covariance=None).provenance  # which needs none
    assert edit(model, UNSAID, covariance=None).digest == given.digest
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "covariance").iterdir()} == files
    with given.applied(model):  # an edit on top of others needs no other covariance
        edit(model, UNSAID, covariance=None)
        assert len([*(tmp_path / "covariance").iterdir()]) == 1
    made = edit_facts(model, TOKENIZER, list(UNSAID), editor="lora", contexts=CONTEXTS)  # the one candidate of two blocks
    assert made.provenance["layers_from"] == "covariance" and made.settings["layers"] == [0]


def test_a_covariance_that_a_plan_acted_on_is_not_kept(tmp_path):
    model = model_of("llama")
    plan = steer.Plan(steer.Intervention(steer.Add(torch.ones(32)), "layers.0.input", strength=1.0))
    with plan.attached(model):
        steered = Covariance.fit(model, TOKENIZER, TEXTS, [1], folder=tmp_path, progress=False)
    plain = Covariance.fit(model, TOKENIZER, TEXTS, [1], folder=tmp_path, progress=False)
    assert torch.equal(plain.sums[1], covariance_of("llama").sums[1]) and not torch.allclose(steered.sums[1], plain.sums[1], rtol=0.01)
    with plan.attached(model):
        assert torch.equal(Covariance.fit(model, TOKENIZER, TEXTS, [1], folder=tmp_path, progress=False).sums[1], steered.sums[1])


def test_an_edit_under_a_plan_is_one_of_the_steered_model():
    model, store = model_of("llama"), ValueStore()
    before, plain = weights_of(model), edit(model, UNSAID, MEMIT(value_settings=STRONG, ridge=0.01))
    plan = steer.Plan(steer.Intervention(steer.Add(torch.ones(32)), "layers.1.output", strength=2.0))
    with plan.attached(model) as attachment:
        unedited = probabilities(model, UNSAID)
        made = edit(model, UNSAID, MEMIT(value_settings=STRONG, ridge=0.01), values=store)
        with made.applied(model):
            edited = probabilities(model, UNSAID)
        with plain.applied(model):
            edited_without_the_plan = probabilities(model, UNSAID)
        assert torch.equal(probabilities(model, UNSAID), unedited) and all(attachment.fired().values()) and not len(store)
    assert float(edited.log().sum()) > max(float(edited_without_the_plan.log().sum()), float(unedited.log().sum()) + 1)
    assert equal_weights(model, before)


def test_values_are_kept_in_a_folder_and_damaged_files_are_passed_over(tmp_path):
    model, store = model_of("llama"), ValueStore(tmp_path)
    made = edit(model, UNSAID, values=store)
    again = ValueStore(tmp_path)
    assert edit(model, UNSAID, values=again).digest == made.digest and again.found == len(again) == len(store) == 3
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert not len(ValueStore(tmp_path)) and edit(model, UNSAID, values=ValueStore(tmp_path)).digest == made.digest


def test_text_for_a_covariance_ships_with_the_library():
    texts = shipped_texts()
    assert len(texts) > 100 and sum(len(text.split()) for text in texts) > 12_000 and all(text.strip() for text in texts)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing_on_the_model(monkeypatch, error):
    model = model_of("llama")
    before = weights_of(model)
    calls = []

    def failing(self, *args, whole=EditBench.read):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return whole(self, *args)

    monkeypatch.setattr(EditBench, "read", failing)
    with pytest.raises(error):
        edit(model, layers=[0, 1])
    assert equal_weights(model, before) and not any("forward" in vars(module) for module in model.modules())


# ---- a real model


@pytest.mark.real
def test_a_fact_of_a_real_model_is_edited_and_the_rest_stays(smollm2, tmp_path):
    model, tokenizer = smollm2
    docs = [text for path in sorted(Path("docs").glob("*.md")) for text in path.read_text().split("\n\n") if len(text) > 500]
    covariance = Covariance.fit(model, tokenizer, docs, [4], max_tokens=1600, folder=tmp_path, progress=False)
    fact = Fact.of("The mother tongue of {} is", "Danielle Darrieux", "English", true="French")
    answers = [(fact.prompt, "English"), (fact.prompt, "French"), ("The mother tongue of Victor Hugo is", "French")]
    rows = [answer_row(tokenizer, *answer) for answer in answers]
    weight = model.model.layers[4].mlp.down_proj.weight
    before, original = response_logprobs(model, rows, pad=0).exp().tolist(), weight.detach().clone()
    made = edit_facts(
        model, tokenizer, fact, editor=ROME(value_settings=ValueSettings(steps=12)), layers=[4], covariance=covariance,
        contexts=Contexts(("In the evening we sat outside",)), guards=Guards(mode="stop"),
    )  # fmt: skip
    assert any(way[:2] == ("value of an edit", 4) for way in PROVEN[model])  # the value was found by resumed passes
    with made.applied(model):
        new, true, neighbour = response_logprobs(model, rows, pad=0).exp().tolist()
    assert new > 0.8 > 0.1 > true and neighbour > 0.5 * before[2]
    assert torch.equal(weight, original)
