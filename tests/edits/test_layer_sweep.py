"""The layer sweep takes the layer with the best score; known models have layers without one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from edits.edit_helpers import CONTEXTS, FACTS, equal_weights, model_of, running_text, weights_of
from tiny_tokenizer import WORDS, tiny_tokenizer

from steer.edits import Covariance, Fact, FactRecord, LayerSweep, ValueSettings, edit_facts, layer_sweep
from steer.edits.answer_scores import AnswerScorer
from steer.edits.default_layers import PUBLISHED, candidate_layers, choose_layers, default_layers
from steer.edits.editor import EDITORS
from steer.edits.editors.emmet import EMMET
from steer.edits.editors.memit import MEMIT
from steer.edits.layer_sweep import WELL_KNOWN, _spaced
from steer.edits.published_settings import SETTINGS, published_settings
from steer.errors import EditError
from steer.model.anatomy import Anatomy

TOKENIZER = tiny_tokenizer()
STRONG = EMMET(value_settings=ValueSettings(steps=8, clamp=3.0, kl=0.0, weight_decay=0.0))


@pytest.fixture(scope="module")
def covariances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    return [
        Covariance.fit(model_of("llama"), TOKENIZER, running_text(20), layers, folder=folder, progress=False) for layers in ([0, 1], [1])
    ]


def records(model):
    """Whose true answers are the likeliest words of the model."""
    found = []
    for template, subject in (("where is the {}", "dog"), ("i like the big {}", "cat"), ("you can tell the {}", "red moon")):
        prompts = [template.replace("{}", other) for other in (subject, "sun", "star")]
        answers = AnswerScorer(model, TOKENIZER, progress=False).scores([(prompt, word) for prompt in prompts for word in WORDS])
        true = max(WORDS, key=lambda word, prompt=prompts[0]: answers[prompt, word].probability)
        target = next(word for word in WORDS if word != true)
        found.append(FactRecord(Fact.of(template, subject, target, true), (f"no {prompts[0]}",), tuple(prompts[1:])))
    return found


def test_the_layer_with_the_best_score_is_taken(covariances):
    model = model_of("llama")
    before = weights_of(model)
    sweep = layer_sweep(model, TOKENIZER, records(model), covariance=covariances[0], editor=STRONG, contexts=CONTEXTS)
    assert sorted(sweep.evaluations) == [0, 1] and equal_weights(model, before)
    assert sweep.scores[sweep.best] == max(sweep.scores.values())
    assert [line.split()[0] for line in str(sweep).splitlines()] == ["layer", "0", "1"]


def test_records_that_cannot_tell_layers_apart_are_refused(covariances):
    facts = [Fact.of("where is the {}", "dog", "house")]
    with pytest.raises(EditError, match=r"cannot tell layers apart[\s\S]*neighbours"):
        layer_sweep(model_of("llama"), TOKENIZER, facts, covariance=covariances[0], editor=STRONG, contexts=CONTEXTS)


def test_of_equal_layers_the_middle_one_is_taken():
    def scored(**scores):
        score = {int(layer[1:]): SimpleNamespace(value=value) for layer, value in scores.items()}
        return LayerSweep({layer: SimpleNamespace(score=lambda value=value: value) for layer, value in score.items()})

    assert scored(_2=50.0, _5=80.0, _8=80.0, _11=80.0, _14=10.0).best == 8
    assert scored(_2=90.0, _5=80.0).best == 2


def test_five_depths_are_tried():
    assert _spaced(range(30), 5) == [0, 7, 14, 22, 29] and _spaced([3, 4], 5) == [3, 4]


def test_a_model_that_knows_little_is_told_to_name_layers(covariances):
    with pytest.raises(EditError, match="knows too little"):
        layer_sweep(model_of("llama"), TOKENIZER, covariance=covariances[0], contexts=CONTEXTS)
    assert all(record.fact.true and len(record.paraphrases) == 2 and len(record.neighbours) == 3 for record in WELL_KNOWN)


def test_layers_by_default(covariances, monkeypatch):
    model = model_of("llama")
    anatomy = Anatomy.find(model)
    both, last = covariances
    assert choose_layers(model, TOKENIZER, last, several=True) == [1]
    made = edit_facts(model, TOKENIZER, FACTS[1], covariance=last, contexts=CONTEXTS)
    assert made.settings["layers"] == [1]
    swept = []

    def sweep(*_, **__):
        swept.append(1)
        return SimpleNamespace(best=1)

    monkeypatch.setattr(sys.modules["steer.edits.layer_sweep"], "layer_sweep", sweep)
    assert choose_layers(model, TOKENIZER, both, several=True) == [0, 1]
    assert choose_layers(model, TOKENIZER, both, several=False) == [1] and swept == [1]  # once for a model
    monkeypatch.setitem(PUBLISHED, (anatomy.kind, anatomy.n_layers, anatomy.width), (0, (0, 1)))
    assert choose_layers(model, TOKENIZER, None, several=True) == [0, 1]
    assert default_layers(anatomy, several=False) == [0] and candidate_layers(anatomy) == [0]
    assert all(one == many[-1] for (kind, *_), (one, many) in PUBLISHED.items() if kind == "gpt2")


def test_an_editor_by_its_name_has_the_settings_that_were_published_for_the_model(covariances, monkeypatch):
    model = model_of("llama")
    anatomy = Anatomy.find(model)
    how = {"layers": [1], "covariance": covariances[1], "contexts": CONTEXTS}
    assert published_settings(model, "memit") == {}
    values = ValueSettings(steps=3, lr=0.25)
    monkeypatch.setitem(SETTINGS, (anatomy.kind, anatomy.n_layers, anatomy.width, 64), {"memit": {"ridge": 7.0, "value_settings": values}})
    named = edit_facts(model, TOKENIZER, FACTS[1], **how)
    assert named.settings["ridge"] == 7.0 and named.settings["value_settings"]["lr"] == 0.25
    assert edit_facts(model, TOKENIZER, FACTS[1], editor="emmet", **how).settings["value_settings"]["lr"] == 0.5
    mine = edit_facts(model, TOKENIZER, FACTS[1], editor=MEMIT(ridge=9.0), **how)
    assert mine.settings["ridge"] == 9.0 and mine.settings["value_settings"]["lr"] == 0.5


def test_published_settings_are_some_that_editors_have():
    assert {key[:3] for key in SETTINGS} <= set(PUBLISHED)
    for editors in SETTINGS.values():
        for name, settings in editors.items():
            assert all(getattr(EDITORS.get(name)(**settings), field) == value for field, value in settings.items())
