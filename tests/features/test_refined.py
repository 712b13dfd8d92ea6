"""SAE-refined directions keep the features that the texts show to differ and that make up the direction."""

import pytest
import torch
from directions.test_extract import planted
from hand import recorded

from steer.directions import extract
from steer.errors import ConfigError, ContrastError, SiteError, WidthError
from steer.features import Encoder, InMemory, Origin, sae_refined
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder

SITE = "layers.1.output"


def of_rows(rows: torch.Tensor, bias: torch.Tensor, site: str = SITE) -> SparseAutoencoder:
    """ReLU features that read and write the same rows."""
    return SparseAutoencoder(Encoder(InMemory(rows), bias, ReLU()), InMemory(rows), torch.zeros(rows.shape[1]), Origin((site,), (site,)))


def dictionary(direction: torch.Tensor, features: int = 40) -> SparseAutoencoder:
    """Feature 3 reads and writes the planted direction, feature 5 its opposite; the others are random and read little."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(features, 32, generator=generator)
    rows = 0.3 * rows / rows.norm(dim=-1, keepdim=True)
    unit = direction / direction.norm()
    rows[3], rows[5] = unit, -unit
    bias = torch.full((features,), -0.05)
    bias[3] = -2.0  # off in the texts without the concept
    return of_rows(rows, bias)


def test_the_planted_feature_is_found_and_makes_the_direction(tiny):
    model = tiny("llama")
    contrast, direction = planted(model)
    raw = extract(model, contrast, [SITE], name="x", span=3, progress=False)[SITE]
    refinement = sae_refined(model, contrast, raw, dictionary(direction), top=1, progress=False)
    assert refinement.features.tolist() == [3] and 0.5 < float(refinement.shares[0]) < 1.5
    refined = refinement.direction
    assert float(torch.cosine_similarity(refined.vector, direction, dim=0)) > 0.999
    assert refined.metrics["auc"] == 1.0 and refined.metrics["gap"] == pytest.approx(float(refined.vector.norm()))
    assert (refined.method, refined.span, refined.site) == ("sae_refined", 3, raw.site) and refined.fitted_on == raw.fitted_on
    more = sae_refined(model, contrast, raw, dictionary(direction), top=10, progress=False)
    assert len(more.features) <= 10 and more.features[0] == 3 and (more.shares.diff() <= 0).all() and (more.shares > 0).all()


def test_amplitudes_are_means_over_the_span_of_the_training_texts(tiny):
    """The vector is the sum of decoder rows times the difference of the classes' mean activations, in the direction's part."""
    model = tiny("llama")
    contrast, direction = planted(model)
    raw = extract(model, contrast, [SITE], name="x", progress=False)[SITE]
    sae = dictionary(direction)
    refinement = sae_refined(model, contrast, raw, sae, top=40, progress=False)
    means, fires = [], []
    for side in (lambda part: part.positive, lambda part: part.negative):
        rows = side(contrast.split(0.25, 0)[0])
        with torch.no_grad(), recorded(model, [SITE]) as seen:
            model(torch.tensor([row.ids for row in rows]))
        active = sae.encode(seen[SITE][:, 3:]).mean(1)
        means.append(active.mean(0))
        fires.append((active > 0).float().mean(0))
    amplitude, fired = means[0] - means[1], fires[0] - fires[1]
    written = sae.decoder_rows(list(range(40)))
    part = amplitude * (written @ raw.unit)
    selected = (part > 0) & (amplitude * fired > 0)
    assert set(refinement.features.tolist()) == set(selected.nonzero().flatten().tolist())
    expected = (amplitude * selected) @ written
    assert float(torch.cosine_similarity(refinement.direction.vector, expected, dim=0)) > 0.9999
    assert torch.allclose(refinement.shares.float(), (part / raw.vector.norm())[refinement.features], atol=1e-4)


def test_bad_input_is_named(tiny):
    model = tiny("llama")
    contrast, direction = planted(model)
    raw = extract(model, contrast, [SITE], name="x", progress=False)[SITE]
    sae = dictionary(direction)
    dead = of_rows(torch.randn(40, 32), torch.full((40,), -1e6))
    narrow = of_rows(torch.ones(4, 16), torch.zeros(4))
    elsewhere = of_rows(torch.randn(40, 32), torch.zeros(40), "layers.0.output")
    for candidate, options, error, message in [
        (narrow, {}, WidthError, "does not fit"),
        (elsewhere, {}, SiteError, "of different sites"),
        (torch.eye(32), {}, ConfigError, "the dictionary of a refined direction"),
        (sae, {"top": 0}, ConfigError, "the number of features that are kept"),
        (dead, {}, ContrastError, "no feature accounts for the direction"),
        (sae, {"seed": 1}, ContrastError, "the held-out texts use texts that the direction was made from"),
    ]:
        with pytest.raises(error, match=message):
            sae_refined(model, contrast, raw, candidate, progress=False, **options)
