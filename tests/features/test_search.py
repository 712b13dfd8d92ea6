"""Search for features: the right one is found, its scores are those of scikit-learn, and the text it is reported on is another."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from features.words import sentences, token, word_dictionary
from method_tables import check_table
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny_tokenizer import WORDS, tiny_tokenizer
from transformers import PreTrainedModel

import steer
from steer.errors import ConfigError, DamagedFileError, TokenizerError
from steer.features.encoding import encode_texts
from steer.features.provenance import Untrained
from steer.features.search import SEARCHES, FoundFeatures, MarkedTexts
from steer.features.search.firing import FiringCounts, cell_of
from steer.lens import LabelledTexts

ANIMALS = ["cat", "dog"]
FEATURES = ["sun", "cat", "fire", "dog", "the", "water"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


def search(model: PreTrainedModel, **options: Any) -> FoundFeatures:
    settings = {"tokenizer": tiny_tokenizer(), "texts": sentences(200), "top": 2, "least": 5, **options}
    concepts = settings.pop("concepts", {"animal": ANIMALS, "heat": ["fire", "sun"]})
    return steer.find_features(model, word_dictionary(model, FEATURES), concepts, **settings)


# ---- what is found


def test_the_features_of_each_concept_are_found_and_hold_on_other_text(model: PreTrainedModel) -> None:
    found = search(model)
    assert {one.feature for one in found.of("animal")} == {1, 3} and {one.feature for one in found.of("heat")} == {0, 2}
    for one in found.features:
        assert one.development["precision"] == one.report["precision"] == 1
        assert 0 < one.report["recall"] < 1  # one word of two
        assert one.maximum == pytest.approx(1, abs=1e-4)
    assert found.facts["compared"] == 6 and found.facts["report"]["marked"]["animal"] >= 5


def test_the_report_is_of_other_text(model: PreTrainedModel) -> None:
    development, report = ["the cat sat the dog ran"] * 12, ["the dog ran the dog sat"] * 12
    found = search(model, texts=development, report_texts=report, concepts={"animal": ANIMALS})
    of = {one.feature: one for one in found.of("animal")}
    assert of[1].development["recall"] == of[3].development["recall"] == 0.5
    assert of[1].report["recall"] == 0 and of[3].report["recall"] == 1


def test_a_report_on_the_text_that_features_were_chosen_by_is_warned_of(model: PreTrainedModel) -> None:
    texts = sentences(60)
    with pytest.warns(UserWarning, match="100% of the report is copies"):
        search(model, texts=texts, report_texts=texts)
    with pytest.warns(UserWarning, match="of the report is copies"):
        search(model, texts=sentences(30) * 7)  # blocks of the same text stand in both parts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(model)


def test_words_at_tokens_that_the_dictionary_was_not_trained_on_do_not_count(model: PreTrainedModel) -> None:
    """They have no activation by which a feature could be chosen; every feature would score alike, and the first ones be the best."""
    dictionary = word_dictionary(model, FEATURES, untrained=Untrained(first=1))
    starts = [f"cat {text}" for text in sentences(40) if not {*ANIMALS} & {*text.split()}]
    with pytest.raises(ConfigError, match="too few words in the development text"):
        steer.find_features(model, dictionary, {"animal": ANIMALS}, tokenizer=tiny_tokenizer(), texts=starts, least=1)
    texts = [f"cat {text}" for text in sentences(200)]
    found = steer.find_features(
        model, dictionary, {"animal": ["cat"]}, tokenizer=tiny_tokenizer(), texts=texts[:100], report_texts=texts[100:]
    )
    counted = [sum(text.split()[1:].count("cat") for text in part) for part in (texts[:100], texts[100:])]
    assert [found.facts[part]["marked"]["animal"] for part in ("development", "report")] == counted


def test_a_concept_without_a_token_that_is_read_has_no_scores() -> None:
    counts = FiringCounts(2, 1)
    counts.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1, dtype=torch.bool))
    scores = counts.scores(0)
    assert bool(scores["average_precision"].isnan().all()) and bool(scores["auroc"].isnan().all())


def test_every_concept_that_was_tried_is_in_the_result(model: PreTrainedModel) -> None:
    found = search(model, concepts={"animal": ANIMALS, "colour": ["red", "blue"]})
    assert found.concepts == ("animal", "colour") and len(found.of("colour")) == 2
    assert max(one.report["average_precision"] for one in found.of("colour")) < 0.1
    assert "colour" in str(found) and "animal" in str(found)


def test_labelled_texts_are_told_apart_by_their_largest_activation(model: PreTrainedModel) -> None:
    tokenizer, plain = tiny_tokenizer(), [text for text in sentences(300, seed=3, length=8) if "dog" not in text.split()]
    texts = plain[:40] + [f"{text} dog" for text in plain[40:80]]
    labelled = LabelledTexts.from_texts(tokenizer, texts, [0] * 40 + [1] * 40)
    found = search(model, texts=None, concepts={"with a dog": labelled}, top=1)
    assert found.best("with a dog") == 3 and found.features[0].report["auroc"] == 1
    assert found.facts["development"]["labelled_texts"] == {"with a dog": 40}


def test_the_tokens_that_the_dictionary_was_not_trained_on_are_left_out(model: PreTrainedModel) -> None:
    dictionary = word_dictionary(model, FEATURES, untrained=Untrained(first=1))
    rows = MarkedTexts.read(tiny_tokenizer(), ["cat cat dog", "dog cat cat"], {"animal": ["cat"]}).rows
    seen: list[tuple[int, int, list[float]]] = []
    encode_texts(
        model, dictionary, rows, lambda f, text, place: seen.extend(zip(text.tolist(), place.tolist(), f[:, 1].tolist(), strict=True))
    )
    assert sorted((text, place) for text, place, _ in seen) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {(text, place) for text, place, value in seen if value > 0} == {(0, 1), (1, 1), (1, 2)}


# ---- marks


def test_words_are_marked_where_they_stand_alone_at_their_last_token(smollm2: Any) -> None:
    _, tokenizer = smollm2
    text = "Law and lawyers: an outlaw knows the law, the LAW of constitutional courts. New York is not new."
    texts = MarkedTexts.read(tokenizer, [text], {"law": ["law", "constitutional"], "city": ["new york"]})
    ids = torch.tensor(texts.rows[0].ids)
    said = [[tokenizer.decode([token]).strip().lower() for token in ids[texts.marks[:, place]].tolist()] for place in range(2)]
    assert [word.endswith("w") for word in said[0]] == [True, True, True, False] and "constitutional".endswith(said[0][3])
    assert said[0][:2] == ["law", "law"] and said[1] == ["york"]


def test_rows_are_cut_and_split_between_texts() -> None:
    texts = MarkedTexts.read(tiny_tokenizer(), ["the cat sat on the mat", "a dog ran", "the cat"], {"cat": ["cat"]}, context=4)
    assert [len(row.ids) for row in texts.rows] == [4, 2, 3, 2] and texts.marks[:, 0].nonzero()[:, 0].tolist() == [1, 10]
    first, second = texts.split(0.5)
    assert [len(row.ids) for row in first.rows] == [4, 3] and second.marks[:, 0].tolist() == [False] * 3 + [True]
    assert second.of(torch.tensor([1]), torch.tensor([1])).item()
    many = MarkedTexts.read(tiny_tokenizer(), ["the cat sat"] * 200, {"cat": ["cat"]})
    first, second = many.split(0.3)
    assert (len(first.rows), len(second.rows)) == (140, 60) and second.marks.sum() == 60


# ---- scores


@pytest.mark.parametrize("pieces", [1, 7])
def test_scores_are_those_of_scikit_learn(pieces: int) -> None:
    random = torch.Generator().manual_seed(0)
    f = torch.randn(500, 4, generator=random) * torch.tensor([1.0, 100.0, 1e-4, 1.0])
    f[:, :3] *= torch.rand(500, 3, generator=random) < 0.3  # sparse, with negative values
    marks = torch.rand(500, 2, generator=random) < torch.tensor([0.3, 0.05])
    f[:, 0] += 2 * marks[:, 0] * (f[:, 0] != 0)
    f = f.double().mul(2**10).round().div(2**10).float()  # some values twice
    coarse = cell_of(f)
    counts = FiringCounts(4, 2)
    for part in range(pieces):
        counts.add(f[part::pieces], marks[part::pieces])
    for concept in range(2):
        scores = counts.scores(concept)
        for feature in range(4):
            values, labels = coarse[:, feature].numpy(), marks[:, concept].numpy()
            assert scores["average_precision"][feature].item() == pytest.approx(average_precision_score(labels, values))
            assert scores["auroc"][feature].item() == pytest.approx(roc_auc_score(labels, values))
            assert scores["auroc"][feature].item() == pytest.approx(roc_auc_score(labels, f[:, feature].numpy()), abs=0.01)
            on = f[:, feature] != 0
            assert scores["recall"][feature].item() == pytest.approx((on & marks[:, concept]).sum().item() / marks[:, concept].sum().item())
            assert scores["density"][feature].item() == pytest.approx(on.float().mean().item())
            assert scores["maximum"][feature].item() == pytest.approx(max(f[:, feature].max().item(), 0))


def test_cells_are_in_the_order_of_the_values() -> None:
    values = torch.tensor([-1e30, -5.0, -4.0, -1e-3, 0.0, 1e-3, 0.99, 1.0, 1.02, 7e8])
    cells = cell_of(values)
    assert (cells.diff() > 0).all() and cells[4] == cell_of(torch.tensor([-0.0]))[0]


# ---- files and errors


def test_saved_and_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    found = search(model)
    found.save(tmp_path / "found")
    assert FoundFeatures.load(tmp_path / "found") == found
    text = (tmp_path / "found" / "manifest.json").read_text()
    (tmp_path / "found" / "manifest.json").write_text(text.replace('"rank": 1', '"rank": 2', 1))
    with pytest.raises(DamagedFileError):
        FoundFeatures.load(tmp_path / "found")


def test_drawn(model: PreTrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    search(model).plot(tmp_path / "found.svg")
    assert "average precision" in (tmp_path / "found.svg").read_text()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"concepts": {}}, ConfigError, "no concepts"),
        ({"concepts": {"animal": []}}, ConfigError, "'animal' has no words"),
        ({"concepts": {"animal": "cat"}}, ConfigError, "the concept 'animal'"),
        ({"concepts": {"animal": ["zebra"]}}, ConfigError, "too few words in the development text"),
        ({"texts": None}, ConfigError, "no text in which the words of 'animal'"),
        ({"texts": None, "report_texts": ["a cat"]}, ConfigError, "none to choose by"),
        ({"texts": "the cat sat"}, ConfigError, "the texts"),
        ({"texts": []}, TokenizerError, "there is no text"),
        ({"texts": ["the cat"]}, ConfigError, "too short to keep some"),
        ({"by": "activaton"}, ConfigError, "did you mean 'activation'"),
        ({"by": 3}, ConfigError, "the search"),
        ({"top": 0}, ConfigError, "`top`"),
        ({"holdout": 1.0}, ConfigError, "`holdout`"),
    ],
)
def test_mistakes_are_named(model: PreTrainedModel, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        search(model, **options)


def test_a_concept_that_was_not_tried_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="did you mean 'animal'"):
        search(model).of("animals")


def test_word_features_are_on_at_their_word_alone(model: PreTrainedModel) -> None:
    dictionary = word_dictionary(model, FEATURES)
    f = dictionary.encode(model.get_input_embeddings().weight.detach())
    assert f.nonzero().tolist() == sorted([token(word), place] for place, word in enumerate(FEATURES)) and len(WORDS) > 80


# ---- by what the model says


def speaking(model: PreTrainedModel) -> Any:
    """Feature j, of `FEATURES`, writes the row by which the model's last norm and unembedding say its word."""
    words = model.get_output_embeddings().weight.detach()[[token(word) for word in FEATURES]]
    return word_dictionary(model, FEATURES, decoder=8 * words / model.model.norm.weight.detach())


def test_logit_weights_find_the_features_that_say_the_words(model: PreTrainedModel) -> None:
    dictionary = speaking(model)
    logits = model.lm_head(model.model.norm(dictionary.decoder_rows(list(range(6)))))
    found = steer.find_features(model, dictionary, {"animal": ANIMALS}, tokenizer=tiny_tokenizer(), by="logit_weights", top=2)
    assert {one.feature for one in found.features} == {1, 3} and not found.features[0].report
    ids = [token(word) for word in ANIMALS]
    for one in found.features:
        row = logits[one.feature]
        assert one.development["z"] == pytest.approx(((row[ids].mean() - row.mean()) / row.std()).item(), abs=1e-4)
        assert one.development["rank"] == 1
    on_text = steer.find_features(
        model, dictionary, {"animal": ANIMALS}, tokenizer=tiny_tokenizer(), by="logit_weights", top=2, texts=sentences(200), least=5
    )
    assert [one.feature for one in on_text.features] == [one.feature for one in found.features]
    assert all(one.report["precision"] == 1 for one in on_text.features)


@pytest.mark.parametrize("by", ["output_score", "token_confidence"])
def test_a_feature_is_scored_by_what_the_steered_model_says_next(model: PreTrainedModel, by: str) -> None:
    dictionary = speaking(model)
    texts, tokenizer = sentences(200), tiny_tokenizer()
    search = SEARCHES.get(by)(candidates=6, strength=2.0, prompts=3, length=5)
    found = steer.find_features(model, dictionary, {"animal": ANIMALS}, tokenizer=tokenizer, texts=texts, by=search, top=6, least=5)
    assert len(found.features) == 6 and found.features[0].development[found.measure] >= found.features[-1].development[found.measure]
    rows = MarkedTexts.read(tokenizer, texts, {}, max_tokens=200_000).split(0.5)
    for rows_of_part, part in zip(rows, ("development", "report"), strict=True):
        step = len(rows_of_part.rows) // 3
        ids = torch.tensor([row.ids[:5] for row in rows_of_part.rows[::step][:3]])
        plain = model(ids).logits[:, -1].log_softmax(-1)
        for one in found.features:
            vector = 2.0 * one.maximum * dictionary.decoder_rows([one.feature])[0]
            with steer.Plan(steer.Intervention(steer.Add(vector), "layers.0.input")).attached(model):
                steered = model(ids).logits[:, -1].log_softmax(-1)
            if by == "output_score":
                top = model.lm_head(model.model.norm(vector)).topk(20).indices
                best = steered[:, top].amax(1)
                wanted = ((1 - (steered > best[:, None]).sum(1) / 96) * best.exp()).mean()
            else:
                wanted = (plain.topk(10).values.mean(1) - steered.topk(10).values.mean(1)).mean().abs()
            assert getattr(one, part)[found.measure] == pytest.approx(wanted.item(), abs=1e-5)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks]
    assert not hooks


def test_a_concept_without_a_word_of_one_token_has_no_logit_weights(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="no word that is one token"):
        steer.find_features(model, speaking(model), {"x": ["zebra"]}, tokenizer=tiny_tokenizer(), by="logit_weights")


def test_more_top_tokens_than_there_are_are_refused(model: PreTrainedModel) -> None:
    search = SEARCHES.get("output_score")(tokens=97, candidates=6, prompts=3, length=5)
    with pytest.raises(ConfigError, match=r"`tokens` of 96 at most"):
        steer.find_features(
            model, speaking(model), {"animal": ANIMALS}, tokenizer=tiny_tokenizer(), texts=sentences(200), by=search, least=5
        )


def test_every_search_is_tried_here() -> None:
    check_table(SEARCHES, {"activation", "logit_weights", "output_score", "token_confidence"}, "the last test of this file", "a test")
