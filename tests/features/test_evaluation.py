"""Evaluation of dictionaries: on truths that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from features.feature_plans import autoencoder
from features.planted import ON, SITE, learner, trained
from features.words import sentences, token, word_dictionary
from tiny_tokenizer import WORDS, tiny_tokenizer
from transformers import PreTrainedModel

from steer.errors import ConfigError, ContrastError, WidthError
from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.evaluation import SyntheticFeatures, pooled_texts, reconstruction, sparse_probing, targeted_perturbation
from steer.features.training import Calibration, TokenRows
from steer.features.training.finished import dictionary_of
from steer.lens import LabelledTexts
from steer.model.tokens import plain

FEATURES = ["sun", "cat", "fire", "dog", "the", "water"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


def without(text: str, *words: str) -> str:
    return " ".join("a" if word in words else word for word in text.split())


def labelled(count: int = 40) -> LabelledTexts:
    texts = [without(text, "dog") + (" dog" if i % 2 else " a") for i, text in enumerate(sentences(count, length=7))]
    return LabelledTexts.from_texts(tiny_tokenizer(), texts, [i % 2 for i in range(count)])


# ---- on text


def test_reconstruction_is_that_of_the_formulas(model: PreTrainedModel) -> None:
    rows = TokenRows(torch.randint(7, 96, (12, 10), generator=torch.Generator().manual_seed(0)).int())
    dictionary = autoencoder(untrained=Untrained(first=1))
    figures = reconstruction(model, dictionary, rows, tokens_per_pass=40)
    ids = rows.ids.long()
    h = model(ids, output_hidden_states=True).hidden_states[2][:, 1:].detach()
    made = dictionary.reconstruct(h)
    flat = h.flatten(0, 1)
    assert figures["fvu"] == pytest.approx(((made - h).square().sum() / (flat - flat.mean(0)).square().sum()).item(), rel=1e-4)
    f = dictionary.encode(h).flatten(0, 1)
    assert figures["l0"] == pytest.approx((f != 0).sum(1).float().mean().item())
    assert figures["on_once"] == pytest.approx((f != 0).any(0).float().mean().item())
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    assert figures["ce"] == pytest.approx(loss.item(), rel=1e-4) and figures["tokens"] == 108


def test_a_dictionary_that_reconstructs_exactly_adds_no_loss(model: PreTrainedModel) -> None:
    rows = TokenRows(torch.randint(7, 96, (8, 10), generator=torch.Generator().manual_seed(0)).int())
    eye = torch.cat([torch.eye(32), -torch.eye(32)])
    encoder = Encoder(InMemory(eye), None, JumpReLU(torch.zeros(64)))
    exact = SparseAutoencoder(encoder, InMemory(eye), torch.zeros(32), Origin(("layers.1.output",), ("layers.1.output",)))
    figures = reconstruction(model, exact, rows)
    assert figures["fvu"] < 1e-9 and abs(figures["ce_added"]) < 1e-5 and figures["ce_recovered"] == pytest.approx(1, abs=1e-4)


# ---- on labelled texts


def test_pooled_texts_are_means_over_the_response(model: PreTrainedModel) -> None:
    dictionary = autoencoder(untrained=Untrained(first=1))
    rows = [plain(tiny_tokenizer(), text) for text in ["the cat sat", "a dog ran on the mat", "hello you"]]
    pooled = pooled_texts(model, dictionary, rows)
    for place, row in enumerate(rows):
        h = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0].detach()
        f = dictionary.encode(h, positions=torch.arange(len(h)))
        assert torch.allclose(pooled.h[place], h[row.prompt :].mean(0), atol=1e-5)
        assert torch.allclose(pooled.f[place], f[row.prompt :].sum(0) / row.response, atol=1e-5)


def test_one_feature_tells_the_classes_apart_and_shuffled_labels_do_not(model: PreTrainedModel) -> None:
    probe = sparse_probing(model, word_dictionary(model, FEATURES), {"dogs": labelled(80)})["dogs"]
    assert probe.features[1] == (3,) and list(probe.accuracy) == [1, 2, 5] and probe.accuracy[1] == 1
    assert set(probe.features[1]) <= set(probe.features[2]) and probe.texts == 24
    assert probe.random_labels < 0.75 and probe.majority < 0.75 and probe.dense > probe.majority
    assert probe.described()["top_1"] == 1


def test_ablating_the_features_of_a_class_harms_its_probe_alone(model: PreTrainedModel) -> None:
    classes = {
        word: [f"{without(text, 'cat', 'fire', 'sun')} {word} {word}" for text in sentences(24, length=5)]
        for word in ("cat", "fire", "sun")
    }
    found = targeted_perturbation(model, word_dictionary(model, FEATURES), classes, tokenizer=tiny_tokenizer(), counts=[1])
    assert {name: features[0] for name, features in found.features.items()} == {"cat": 1, "fire": 2, "sun": 0}
    assert min(found.accuracy.values()) > 0.9
    assert found.intended[1] > 0.15 and found.intended[1] > 2 * found.unintended[1] and found.score[1] > found.random[1]
    assert found.score[1] == pytest.approx(found.intended[1] - found.unintended[1])


def test_mistakes_are_named(model: PreTrainedModel) -> None:
    dictionary = word_dictionary(model, FEATURES)
    with pytest.raises(ConfigError, match="nothing to probe"):
        sparse_probing(model, dictionary, {})
    with pytest.raises(ConfigError, match="the task 'a'"):
        sparse_probing(model, dictionary, {"a": ["text"]})  # type: ignore[dict-item]
    for classes, error, says in (
        ({"a": ["the cat"] * 9}, ConfigError, "one of several classes"),
        ({"a": ["the cat"] * 9, "b": ["a dog"]}, ContrastError, "the class 'b' has too few texts"),
        ({"a": ["the cat", "a cat", "one cat", "my cat"], "b": ["a dog", "my dog", "one dog", "the cat"]}, ContrastError, "there twice"),
    ):
        with pytest.raises(error, match=says):
            targeted_perturbation(model, dictionary, classes, tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match="`rows`|the rows"):
        reconstruction(model, dictionary, [[1, 2, 3]])  # type: ignore[arg-type]
    assert token("cat") and len(WORDS) > 80


# ---- with a known truth


def truth_as_dictionary(features: SyntheticFeatures, order: list[int] | None = None) -> SparseAutoencoder:
    """A dictionary of orthogonal features that encodes exactly."""
    rows = features.rows if order is None else features.rows[order]
    site = str(SITE)
    encoder = Encoder(InMemory(rows), None, JumpReLU(torch.full((len(rows),), 0.5)))
    return SparseAutoencoder(encoder, InMemory(3 * rows), torch.zeros(rows.shape[1]), Origin((site,), (site,)))


def orthogonal(**options: Any) -> SyntheticFeatures:
    return SyntheticFeatures(torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0], 0.1, **options)


def test_samples_have_the_frequencies_values_and_correlations_that_were_given() -> None:
    frequency = torch.linspace(0.02, 0.3, 8)
    features = SyntheticFeatures.random(8, 12, frequency, group=2, together=0.9, low=1.0, high=3.0)
    h, f = features.sample(40_000, torch.Generator().manual_seed(1))
    on = (f > 0).float()
    assert torch.allclose(on.mean(0), frequency, atol=0.012) and torch.allclose(h, f @ features.rows, atol=1e-5)
    assert f[f > 0].min() >= 1 and f.max() <= 3 and f[f > 0].mean() == pytest.approx(2, abs=0.02)
    correlation = torch.corrcoef(on.T)
    assert correlation[6, 7] > 0.5 and abs(correlation[0, 2]) < 0.05 and abs(correlation[5, 6]) < 0.05


def test_the_truth_itself_is_found_whatever_its_order() -> None:
    features = orthogonal()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    for dictionary in (truth_as_dictionary(features), truth_as_dictionary(features, order)):
        found = features.compare(dictionary, tokens=5000)
        assert found["mcc"] == pytest.approx(1, abs=1e-5) and found["found"] == found["precision"] == found["recall"] == found["f1"] == 1
        assert found["l0"] == found["true_l0"] and found["fvu"] == pytest.approx(4, rel=0.2)  # the decoder is three times too long


def test_features_that_are_missing_or_of_no_use_are_told() -> None:
    features = orthogonal()
    half = features.compare(truth_as_dictionary(features, list(range(8))), tokens=5000)
    assert half["mcc"] == pytest.approx(0.5, abs=1e-5) and half["found"] == half["recall"] == 0.5
    random = truth_as_dictionary(SyntheticFeatures.random(16, 16, seed=9))
    assert features.compare(random, tokens=5000)["found"] < 0.2
    with pytest.raises(WidthError, match="not of these activations"):
        features.compare(truth_as_dictionary(SyntheticFeatures.random(16, 20, seed=9)))


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (torch.zeros(3, 4), {}, "no rows of features"),
        (torch.eye(3), {"frequency": 1.0}, "no frequency of this size"),
        (torch.eye(3), {"correlation": torch.eye(2)}, "no correlation"),
        (torch.eye(3), {"correlation": 2 * torch.eye(3)}, "no correlation"),
        (torch.eye(3), {"correlation": torch.ones(3, 3)}, "no correlation"),
        (torch.eye(3), {"low": 2.0, "high": 1.0}, "`high`"),
    ],
)
def test_numbers_that_cannot_be(rows: torch.Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SyntheticFeatures(rows, **options)


class OfSynthetic:
    """Synthetic features as the training loop of the tests takes activations."""

    def __init__(self, features: SyntheticFeatures) -> None:
        self.features, self.random = features, torch.Generator().manual_seed(0)

    def batch(self, tokens: int = 256) -> dict[Any, torch.Tensor]:
        return {SITE: self.features.sample(tokens, self.random)[0]}

    def calibration(self) -> Calibration:
        return Calibration.of(self.batch(2048), outlier=10.0)


def test_training_comes_near_the_truth() -> None:
    features = SyntheticFeatures.random(32, 24, ON / 32, noise=0.01)
    data: Any = OfSynthetic(features)
    made = learner(data, 800)
    before = features.compare(dictionary_of(made), tokens=4000)
    trained(made, data, 800)
    after = features.compare(dictionary_of(made), tokens=4000)
    assert before["mcc"] < 0.5 and after["mcc"] > 0.8, (before, after)
    assert before["found"] < 0.1 and after["found"] > 0.5 and after["f1"] > before["f1"] + 0.3
