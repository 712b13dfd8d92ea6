"""Extraction recovers what was planted, from moments that equal numpy's, and judges itself on texts it has not seen."""

import numpy
import pytest
import torch
from hand import hook_count, ids, recorded
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import nn

from steer.directions import EXTRACTORS, ContrastSet, extract, extract_all
from steer.directions.heldout import Projections, auc
from steer.directions.moments import ContrastMoments, Moments
from steer.errors import ConfigError, ContrastError, NonFiniteError, SiteError
from steer.intervene import Clamp, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.capture import capture, pool
from steer.model.site import Site
from steer.model.tokens import Row

SITE = "layers.1.output"
COSINE = {"ccs": 0.4, "logistic": 0.7}  # they read the concept along other dimensions too


def planted(model, count: int = 24, seed: int = 0, paired: bool = True) -> tuple[ContrastSet, torch.Tensor]:
    """Texts whose positive ones differ from the negative ones by one token, and a model that writes a known direction for that token."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(99))
    direction = 6 * direction / direction.norm()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += direction
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
    texts = [ids(1, 6, seed + i)[0].clamp_min(6).tolist() for i in range(2 * count)]
    positive = tuple(Row((*text[:3], 5, *text[4:]), 3) for text in texts[:count])
    negative = tuple(Row((*text[:3], 6, *text[4:]), 3) for text in (texts[:count] if paired else texts[count:]))
    return ContrastSet(positive, negative, paired), direction


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("method", sorted(EXTRACTORS))
def test_a_planted_direction_is_recovered(method, paired, tiny):
    model = tiny("llama")
    contrast, direction = planted(model, paired=paired)
    if EXTRACTORS.get(method).pairs and not paired:
        with pytest.raises(ContrastError, match="compares the two texts of a pair"):
            extract(model, contrast, [SITE], name="planted", method=method, span=3, progress=False)
        return
    directions = extract(model, contrast, [SITE, "embed"], name="planted", method=method, span=3, progress=False)
    for site in (SITE, "embed"):
        entry = directions[site]
        assert cosine(entry.vector, direction) > COSINE.get(method, 0.9)  # the sign too: it points to the positive texts
        assert entry.metrics["auc"] == 1.0 and entry.metrics["dprime"] > 2
    assert hook_count(model) == 0


def test_the_length_is_the_class_gap(tiny):
    """Adding the mean difference once moves the negative texts' mean onto that of the positive ones."""
    model = tiny("llama")
    contrast, _ = planted(model)
    by_method = extract_all(model, contrast, [SITE], name="planted", methods=["mean_difference", "pca"], progress=False)
    train, _ = contrast.split(0.25, 0)
    read = []
    for side in (train.positive, train.negative):
        with torch.no_grad(), recorded(model, [SITE]) as seen:
            model(torch.tensor([row.ids for row in side]))
        read.append(seen[SITE][:, 3:])  # the response
    gap = read[0].mean((0, 1)) - read[1].mean((0, 1))
    assert torch.allclose(by_method["mean_difference"][SITE].vector, gap, atol=1e-5)
    pca = by_method["pca"][SITE]
    assert torch.allclose(pca.vector.norm(), gap @ pca.unit, atol=1e-5) and pca.metrics["gap"] == pytest.approx(float(pca.vector.norm()))
    assert pca.metrics["activation_norm"] == pytest.approx(float(torch.cat(read).norm(dim=-1).mean()), rel=1e-5)
    assert pca.relative_dose(-2.0) == pytest.approx(2 * float(pca.vector.norm()) / pca.metrics["activation_norm"])
    assert pca.metrics["mean"] == pytest.approx(float((torch.cat(read) @ pca.unit).mean()), rel=1e-4)


def test_a_projection_is_clamped_to_its_mean(tiny):
    model = tiny("llama")
    contrast, _ = planted(model)
    direction = extract(model, contrast, [SITE], name="planted", progress=False)[SITE]
    plan = Plan(Intervention(Clamp(direction.vector, direction.metric("mean")), SITE))
    with torch.no_grad(), plan.attached(model), recorded(model, [SITE]) as seen:
        model(torch.tensor([contrast.positive[0].ids]))
    reached = seen[SITE] @ direction.unit
    assert torch.allclose(reached, torch.full_like(reached, direction.metrics["mean"]), atol=1e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_pca_equals_sklearn(paired):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator) * torch.tensor([4.0, 2, 1, 1, 1, 1]) + 50
    side = torch.arange(40) % 2 == 0
    x[side] += torch.tensor([0.0, 3, 0, 0, 0, 0])
    moments = ContrastMoments(side, paired, ("differences",))
    for start in range(0, 40, 8):
        moments.update(x[start : start + 8, None], torch.ones(8, 1), torch.arange(start, start + 8))
    if paired:
        difference = (x[side] - x[~side]).double().numpy()
        expected = numpy.linalg.svd(difference)[2][0]
    else:
        expected = PCA(1).fit(x.double().numpy()).components_[0]
    assert abs(cosine(EXTRACTORS.get("pca").direction(moments), torch.tensor(expected))) > 1 - 1e-6


@given(st.integers(1, 6), st.integers(2, 30), st.integers(0, 99), st.sampled_from([0.0, 1e4]))
def test_moments_equal_numpys_in_any_pieces(width, count, seed, offset):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    moments = Moments.empty(width, True)
    for piece in x.split(max(count // 3, 1)):
        moments.add(piece)
    assert moments.n == count
    numpy.testing.assert_allclose(moments.mean.numpy(), x.numpy().mean(0), rtol=1e-12, atol=1e-12)
    covariance = moments.second / count - torch.outer(moments.mean, moments.mean)
    numpy.testing.assert_allclose(covariance.numpy(), numpy.cov(x.numpy().T, bias=True).reshape(width, width), atol=1e-6)


def test_pooling_is_the_mean_over_the_span():
    h = torch.randn(2, 5, 3).bfloat16()
    weight = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = torch.stack([(h[0, 0].float() + h[0, 2].float()) / 2, h[1, 4].float()])
    assert torch.allclose(pool(h, weight), expected) and pool(h, weight).dtype is torch.float32


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=20), st.lists(st.integers(-4, 4), min_size=1, max_size=20))
def test_auc_equals_sklearns_with_ties(positive, negative):
    p, q = torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64)
    expected = roc_auc_score([1] * len(positive) + [0] * len(negative), positive + negative)
    assert auc(p, q) == pytest.approx(expected)


def test_held_out_texts_have_no_part_in_the_direction(tiny):
    """Changed held-out texts leave the direction equal to the bit; they only judge it."""
    model = tiny("llama")
    contrast, _ = planted(model)
    train, held = contrast.split(0.25, seed=3)
    swapped = {id(row): i for i, row in enumerate(contrast.positive)}
    fresh, _ = planted(tiny("llama"), seed=500)
    positive, negative = list(contrast.positive), list(contrast.negative)
    for row in held.positive:
        index = swapped[id(row)]
        positive[index], negative[index] = fresh.positive[index], fresh.negative[index]
    altered = ContrastSet(tuple(positive), tuple(negative), True)
    a, b = (extract(model, texts, [SITE], name="x", seed=3, progress=False)[SITE] for texts in (contrast, altered))
    assert torch.equal(a.vector, b.vector) and a.metrics["sd"] != b.metrics["sd"]
    assert a.metrics["n_train"] == len(train.positive) * 2 and a.metrics["n_heldout"] == len(held.positive) * 2


def test_random_labels_do_not_separate(tiny):
    """Noise separates the texts that it was read from and fails on new texts; the reported AUC is that of the new texts."""
    model = tiny("llama")
    texts = [Row(tuple(ids(1, 6, i)[0].tolist()), 2) for i in range(80)]
    contrast = ContrastSet(tuple(texts[:40]), tuple(texts[40:]), paired=False)
    direction = extract(model, contrast, [SITE], name="noise", holdout=0.5, progress=False)[SITE]
    train, _ = contrast.split(0.5, 0)
    fitted = Projections(direction.unit[None], 40)
    capture(model, [*train.positive, *train.negative], {Site.parse(SITE): fitted})
    assert auc(fitted.values[:20, 0], fitted.values[20:, 0]) > 0.7
    assert 0.25 < direction.metrics["auc"] < 0.75


def test_many_sites_and_methods_from_one_pass(tiny, monkeypatch):
    model = tiny("llama")
    contrast, _ = planted(model)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    by_method = extract_all(model, contrast, ["layers.*.output", "final_norm"], name="x", methods=sorted(EXTRACTORS), progress=False)
    assert len(passes) == 2  # one over the training texts, one over those held out
    assert list(by_method) == sorted(EXTRACTORS)
    for method, directions in by_method.items():
        assert [str(site) for site in directions] == ["layers.0.output", "layers.1.output", "layers.2.output", "final_norm"]
        alone = extract(model, contrast, ["layers.1.output"], name="x", method=method, progress=False)
        assert torch.equal(alone[SITE].vector, directions[SITE].vector)
        assert alone[SITE].metrics == pytest.approx(directions[SITE].metrics, rel=1e-4)


def test_provenance_says_what_was_read_from_what(tiny):
    model = tiny("llama")
    contrast, _ = planted(model)
    directions = extract(model, contrast, [SITE], name="x", holdout=0.5, seed=7, progress=False)
    assert directions.provenance == {
        "model": Anatomy.find(model).fingerprint(),
        "data_sha256": contrast.digest(),
        "fitted_on": sorted(contrast.split(0.5, 7)[0].digests()),
        "paired": True,
        "holdout": 0.5,
        "seed": 7,
        "method": "mean_difference",
        "held_out": "texts",
    }


def test_a_wrapped_model_gives_the_same(tiny):
    model = tiny("llama")
    contrast, _ = planted(model)
    wrapper = nn.ModuleDict({"net": model})
    wrapper.forward = lambda **batch: model(**batch)
    a, b = (extract(target, contrast, [SITE], name="x", progress=False)[SITE].vector for target in (model, wrapper))
    assert torch.equal(a, b)


def test_bad_input_is_named(tiny):
    model = tiny("llama")
    contrast, _ = planted(model)
    for options, error, message in [
        ({"method": "pcaa"}, ConfigError, "did you mean 'pca'"),
        ({"span": "repsonse"}, ConfigError, "did you mean 'response'"),
        ({"span": 9}, ContrastError, "no token in the span '9'"),
        ({"span": 0}, ContrastError, f"do not differ at '{SITE}'"),  # the first token is the same in both texts of a pair
        ({"holdout": 0.01}, ContrastError, "too few texts to hold some out"),
        ({"holdout": 0.01, "span": "last_prompt"}, ConfigError, "did you mean 'prompt_last'"),  # before there are enough texts
    ]:
        with pytest.raises(error, match=message):
            extract(model, contrast, [SITE], name="x", progress=False, **options)
    for site in ("layers.5.output", "layers.0-7.output"):
        with pytest.raises(SiteError, match="0 to 2"):
            extract(model, contrast, [site], name="x", progress=False)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        extract(model, contrast, [SITE], name="x", progress=False)
    assert hook_count(model) == 0
