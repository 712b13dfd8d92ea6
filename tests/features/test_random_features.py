"""Random features that match chosen ones, and the statistics that they are matched by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, WIDTH
from features.feature_plans import FEATURES, SITE, autoencoder, numbers
from torch import Tensor

import steer
from steer.errors import ConfigError
from steer.features import Encoder, InMemory, Origin, Untrained, feature_statistics, random_features
from steer.features.activations.relu import ReLU
from steer.features.architectures.crosscoder import Crosscoder
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.random_features import decoder_norms, matched
from steer.model.tokens import Row

WIDE = 600


def wide() -> tuple[SparseAutoencoder, Tensor]:
    """Features whose densities and decoder norms span some orders of magnitude."""
    lengths = torch.exp(1.5 * numbers(WIDE, seed=1))
    rows = lengths[:, None] * torch.nn.functional.normalize(numbers(WIDE, 8, seed=2))
    encoder = Encoder(InMemory(numbers(WIDE, 8, seed=3)), None, ReLU())
    dictionary = SparseAutoencoder(encoder, InMemory(rows), torch.zeros(8), Origin((SITE,), (SITE,)))
    return dictionary, torch.exp(-3 - numbers(WIDE, seed=4).abs())


def texts(count: int = 6, tokens: int = 9) -> list[Row]:
    ids = torch.randint(7, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(3))
    return [Row(tuple(row[: tokens - number % 3]), 2) for number, row in enumerate(ids.tolist())]


def test_random_features_are_as_dense_and_as_long_as_the_chosen_ones() -> None:
    dictionary, density = wide()
    chosen = [10, 400, 77, 5]
    drawn = random_features(dictionary, chosen, draws=6, density=density)
    assert len(drawn) == 6 and all(len(set(draw)) == 4 and not set(draw) & set(chosen) for draw in drawn)
    assert len({feature for draw in drawn for feature in draw}) == 24  # none comes twice where there are enough
    quality = matched(dictionary, chosen, drawn, density)
    places = torch.tensor(drawn)
    for values, worst in ((density, quality.density), (decoder_norms(dictionary), quality.norm)):
        ratios = values[places].double() / values[chosen].double()
        assert max(float(ratios.max()), 1 / float(ratios.min())) == pytest.approx(worst) and worst <= 3
    at_random = torch.randint(WIDE, (6, 4), generator=torch.Generator().manual_seed(0)).tolist()
    assert matched(dictionary, chosen, at_random, density).norm > 2 * quality.norm


def test_the_seed_decides() -> None:
    dictionary, density = wide()
    first, again, other = (random_features(dictionary, [10, 400], seed=seed, density=density) for seed in (0, 0, 1))
    assert first == again != other
    assert random_features(dictionary, [10, 400], draws=2, density=density) == first[:2]
    torch.manual_seed(0)
    assert random_features(dictionary, [10, 400], density=density) == first


def test_what_is_recorded_is_saved_and_used(tmp_path: Path) -> None:
    dictionary, density = wide()
    with pytest.raises(ConfigError, match="nobody recorded how often"):
        random_features(dictionary, [10])
    dictionary.density = density
    loaded = steer.load_dictionary(dictionary.save(tmp_path / "saved"))
    assert loaded.density is not None and torch.equal(loaded.density, density) and loaded.maxima is None
    assert random_features(loaded, [10]) == random_features(dictionary, [10], density=density)


def test_what_cannot_be_matched_is_refused() -> None:
    dictionary, density = wide()
    silent = density.clone()
    silent[10] = 0
    with pytest.raises(ConfigError, match="never on"):
        random_features(dictionary, [10], density=silent)
    always = density.clone()
    always[10] = 1.0
    with pytest.raises(ConfigError, match="no random feature is left for feature 10"):
        random_features(dictionary, [10], density=always)
    with pytest.raises(ConfigError, match="not that of this dictionary"):
        random_features(dictionary, [10], density=density[:5])
    with pytest.raises(ConfigError, match="each named once"):
        random_features(dictionary, [10, 10], density=density)
    alike = density.clone()
    alike[:] = 0.001
    alike[[10, 20, 30]] = 0.5
    for row in (20, 30):
        dictionary.decoder.tensor[row] = dictionary.decoder.tensor[10]  # type: ignore[attr-defined]
    assert {feature for draw in random_features(dictionary, [10], draws=2, density=alike) for feature in draw} == {20, 30}
    with pytest.raises(ConfigError, match="two draws of random features are the same"):
        random_features(dictionary, [10], draws=3, density=alike)


def by_hand(model: torch.nn.Module, rows: list[Row], layer: int, first: int, start: int = 0) -> Tensor:
    """[tokens, width] after a block, text by text."""
    states = [model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[layer + 1][0, max(first, start) :] for row in rows]
    return torch.cat(states)


@pytest.mark.parametrize("span", ["all", "response"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_statistics_are_those_of_whole_encoding_text_by_text(activation: str, span: str) -> None:
    model, rows = FAMILIES["llama"](), texts()
    dictionary = autoencoder(activation, untrained=Untrained(first=3, max_norm=None), site="layers.0.output", spread=3.0)
    with torch.no_grad():
        h = by_hand(model, rows, 0, first=3, start=2 if span == "response" else 0)
        f, pre = dictionary.encode(h), dictionary.pre_activations(h)
    for features in (None, [5, 33, 8]):
        places = list(range(FEATURES)) if features is None else features
        found = feature_statistics(model, dictionary, rows, features, span=span, max_tokens=30)
        assert found.tokens == len(h)
        assert torch.allclose(found.density, (f != 0).float().mean(0)[places])
        assert torch.allclose(found.mean, f.mean(0)[places], atol=1e-5)
        assert torch.allclose(found.maximum, f.amax(0).clamp_min(0)[places], atol=1e-5)
        assert torch.allclose(found.mean_pre, pre.mean(0)[places], atol=1e-5)


def test_statistics_of_a_crosscoder_read_its_sites_together() -> None:
    model, rows = FAMILIES["llama"](), texts()
    sites = ("layers.0.output", "layers.1.output")
    encoder = Encoder(InMemory(numbers(FEATURES, 2, WIDTH, seed=1)), None, ReLU())
    decoder = InMemory(numbers(FEATURES, 2, WIDTH, seed=2))
    dictionary = Crosscoder(encoder, decoder, torch.zeros(2, WIDTH), Origin(sites, sites, untrained=Untrained(first=1)))
    states = []
    with torch.no_grad():
        for row in rows:
            hidden = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            states.append(torch.stack([hidden[1][0, 1:], hidden[2][0, 1:]], 1))
        f = dictionary.encode(torch.cat(states))
        found = feature_statistics(model, dictionary, rows, [5, 33])
    assert found.tokens == len(f) and torch.allclose(found.mean, f.mean(0)[[5, 33]], atol=1e-5) and bool((found.mean > 0.1).all())


def test_texts_without_a_trained_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="no token of the kind"):
        feature_statistics(FAMILIES["llama"](), autoencoder(untrained=Untrained(first=50)), texts())
