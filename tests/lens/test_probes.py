"""Probes: numbers and classes that were planted are read, random labels are not, and an answer's tokens are found."""

import pytest
import torch
from families import WIDTH
from hand import ids
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.directions import Directions
from steer.directions.extractor import EXTRACTORS
from steer.errors import ConfigError, ContrastError, TokenizerError
from steer.lens import ANSWER_TOKENS, PROBES, LabelledTexts, fit_probe
from steer.lens.probe import _rank_correlation
from steer.lens.probes.ridge import PENALTIES
from steer.model.tokens import Row

SITE = "layers.1.output"


def planted(tiny, count: int = 60, groups: bool = False, classes: bool = False):
    """A model whose token embeddings 30 to 69 say a number along one direction, and texts that end in such a token."""
    model = tiny("llama")
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    direction /= direction.norm()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
        for token in range(30, 70):
            model.get_input_embeddings().weight[token] += (token - 50) / 5 * direction
    rows, labels, generator = [], [], torch.Generator().manual_seed(11)
    for i in range(count):
        token = 30 + (7 * i) % 40
        rows.append(Row((*torch.randint(3, 30, (4,), generator=generator).tolist(), token), 4))
        labels.append(float(token >= 50) if classes else float(token))
    names = tuple("abcdef"[i % 6] for i in range(count)) if groups else ()
    return model, direction, LabelledTexts(tuple(rows), tuple(labels), names)


def test_a_number_is_read_and_judged_as_by_hand(tiny):
    model, direction, texts = planted(tiny)
    found = fit_probe(model, texts, [SITE, "embed"], name="number", method="ridge", progress=False)
    entry = found[SITE]
    assert entry.metrics["r2"] > 0.9 < entry.metrics["rank_correlation"] and entry.held_out == "texts"
    assert float(entry.unit @ direction) > 0.8  # it points to larger numbers
    assert entry.metrics["selectivity"] > 0.5 > abs(entry.metrics["control"]) and "r2 0.9" in repr(entry)
    fitted, held = texts.split(0.25, 0, classes=False)
    with torch.no_grad():
        states = torch.stack(
            [model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0, -1] for row in texts.rows]
        ).double()
    labels = torch.tensor(texts.labels).double()
    x = states[fitted] - states[fitted].mean(0)
    unit = x.square().mean().sqrt()
    by_hand = RidgeCV(alphas=PENALTIES).fit((x / unit).numpy(), labels[fitted].numpy())
    predicted = torch.from_numpy(by_hand.predict(((states[held] - states[fitted].mean(0)) / unit).numpy()))
    r2 = 1 - float((labels[held] - predicted).square().sum() / (labels[held] - labels[held].mean()).square().sum())
    assert entry.metrics["r2"] == pytest.approx(r2, abs=1e-3)
    assert entry.metrics["rank_correlation"] == pytest.approx(spearmanr(predicted, labels[held]).statistic, abs=1e-3)
    ours = entry.metrics["intercept"] + entry.metrics["slope"] * (states[held] @ entry.unit.double())
    assert torch.allclose(ours, predicted, atol=0.05)
    assert float(entry.vector.norm()) == pytest.approx(float((states[fitted] @ entry.unit.double()).std()), rel=1e-3)


def test_a_probe_is_a_direction(tiny, tmp_path):
    model, _, texts = planted(tiny, groups=True)
    found = fit_probe(model, texts, ["layers.*.output"], name="number", method="ridge", progress=False)
    assert found.best().metrics["r2"] == max(entry.metrics["r2"] for entry in found.values())
    assert (
        found[SITE].held_out == "groups" and found[SITE].metrics["n_heldout_groups"] == 2 and len(found.provenance["groups_fitted_on"]) == 4
    )
    loaded = Directions.load(found.save(tmp_path / "number"))
    assert loaded[SITE].metrics == found[SITE].metrics
    with steer.Plan(steer.Intervention(steer.Add(loaded[SITE].vector), SITE)).attached(model) as attachment:
        model(ids())
        assert attachment.fired()
    with pytest.raises(ContrastError, match="made from"):
        loaded[SITE].check_unseen(texts.rows, "these")


@pytest.mark.parametrize("method", ["correctness", *sorted(name for name in EXTRACTORS if not EXTRACTORS.get(name).pairs)])
def test_classes_are_read_and_random_labels_are_not(method, tiny):
    model, direction, texts = planted(tiny, classes=True)
    entry = fit_probe(model, texts, [SITE], name="large", method=method, controls=8, progress=False)[SITE]
    along = 0.05 if method in ("lda", "leace") else 0.5  # they read the concept along other dimensions too
    assert entry.metrics["auc"] > 0.9 and float(entry.unit @ direction) > along
    assert 0.2 < entry.metrics["control"] < 0.8 and entry.metrics["selectivity"] == pytest.approx(
        entry.metrics["auc"] - entry.metrics["control"]
    )
    assert entry.metrics["control_fit"] > entry.metrics["control"]


def test_without_anything_to_read_nothing_is_selective(tiny):
    model, _, texts = planted(tiny)
    generator = torch.Generator().manual_seed(2)
    noise = LabelledTexts(texts.rows, tuple(torch.randn(60, generator=generator).tolist()))
    entry = fit_probe(model, noise, [SITE], name="noise", method="ridge", controls=8, progress=False)[SITE]
    assert abs(entry.metrics["selectivity"]) < 0.6 and entry.metrics["r2"] < 0.3
    bare = fit_probe(model, noise, [SITE], name="noise", method="ridge", controls=0, progress=False)[SITE]
    assert "selectivity" not in bare.metrics and bare.metrics["r2"] == entry.metrics["r2"]
    assert _rank_correlation(torch.ones(4), torch.arange(4.0)) == 0.0


@pytest.mark.parametrize("token", list(ANSWER_TOKENS))
def test_the_tokens_of_an_answer_are_found(token):
    tokenizer = tiny_tokenizer()
    record = {"prompt": "what is the house ?", "answer": "it is big and red today", "exact": "big and red", "correct": True}
    row = LabelledTexts.from_answers(tokenizer, [record], token=token).rows[0]
    read = tokenizer.decode(row.ids[row.prompt :]).split()
    assert (
        read
        == {
            "prompt_last": ["<assistant>"],
            "exact_before": ["is"],
            "exact_first": ["big"],
            "exact_last": ["red"],
            "exact": ["big", "and", "red"],
            "exact_after": ["<unk>"],
            "last": ["<eos>"],
        }[token]
    )
    whole = steer.model.tokens.encode(tokenizer, record["prompt"], record["answer"])
    assert whole.ids[: len(row.ids)] == row.ids


def test_answers_of_a_file_have_labels_and_groups(tiny):
    words = "cat dog house tree fire water earth sun moon star day night".split()
    answers = [
        {"prompt": f"what is the {word} ?", "answer": f"the {word} is {'good' if i % 2 else 'bad'}", "exact": "good" if i % 2 else "bad"}
        | {"correct": bool(i % 2), "group": "abc"[i % 3]}
        for i, word in enumerate(words)
    ]
    texts = LabelledTexts.from_answers(tiny_tokenizer(), answers)
    assert texts.groups[:4] == ("a", "b", "c", "a") and texts.labels[:2] == (0.0, 1.0) and texts.token == "exact_last"
    found = fit_probe(tiny("llama"), texts, [SITE], name="right", method="correctness", holdout=0.34, progress=False)
    assert found.provenance["token"] == "exact_last" and found[SITE].metrics["auc"] == 1.0 and found[SITE].held_out == "groups"


ANSWER = {"prompt": "a", "answer": "the cat", "exact": "cat", "correct": True}


@pytest.mark.parametrize(
    ("record", "token", "error", "match"),
    [
        ({"exact": "dog"}, "exact_last", TokenizerError, "not in its answer(.|\n)*'dog'"),
        ({"exact": ""}, "exact_last", ConfigError, "answer 0 lacks a part(.|\n)*exact"),
        ({"correct": None}, "last", ConfigError, "answer 0 lacks a part(.|\n)*correct"),
        ({}, "first", ConfigError, "the token of an answer"),
    ],
)
def test_answers_that_cannot_be_read_are_refused(record, token, error, match):
    with pytest.raises(error, match=match):
        LabelledTexts.from_answers(tiny_tokenizer(), [{**ANSWER, **record}], token=token)


@pytest.mark.parametrize(
    ("change", "method", "match"),
    [
        ({"labels": (1.0,) * 60}, "ridge", "labels do not vary"),
        ({"labels": tuple(map(float, range(60)))}, "correctness", "not of two classes"),
        ({"labels": (1.0,) * 59 + (0.0,)}, "correctness", "too few texts to hold some out"),
        ({"groups": ("a",) * 60}, "ridge", "too few groups"),
        ({"groups": ("a",) * 3}, "ridge", "groups do not match the texts"),
        ({"labels": (1.0,)}, "ridge", "labels do not match"),
        ({"labels": (float("nan"),) * 60}, "ridge", "label 0 is no number"),
    ],
)
def test_texts_that_a_probe_cannot_learn_from_are_refused(change, method, match, tiny):
    model, _, texts = planted(tiny)
    with pytest.raises(ContrastError, match=match):
        fit_probe(
            model, LabelledTexts(**{"rows": texts.rows, "labels": texts.labels} | change), [SITE], name="x", method=method, progress=False
        )


def test_copies_and_unknown_probes_are_refused(tiny):
    model, _, texts = planted(tiny)
    with pytest.raises(ContrastError, match="labelled text 1 repeats"):
        LabelledTexts(texts.rows[:1] * 2, (0.0, 1.0))
    with pytest.raises(ConfigError, match="ridge"):
        fit_probe(model, texts, [SITE], name="x", method="rigde", progress=False)
    with pytest.raises(ContrastError, match="pair"):
        fit_probe(model, texts, [SITE], name="x", method="ccs", progress=False)
    assert {"ridge", "correctness"} <= set(PROBES)
