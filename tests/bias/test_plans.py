"""Mitigations that are plans do at a site what their papers say, and refuse what they cannot be fitted on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

import steer
from steer.bias import MITIGATIONS, fit_mitigation, mitigations
from steer.bias.gender_texts import gender_prompts, gender_sentences
from steer.bias.texts import contrast_of
from steer.bias.words import SELECT, TEST
from steer.directions import ContrastSet, fit_erasure
from steer.directions.extract import read_moments
from steer.errors import ConfigError, ContrastError, SiteError
from steer.model.site import Site

SITE = Site.parse("layers.1.output")
ENDS = ["sat on the mat", "ran in the house", "is under a tree", "was not cold", "can see you", "will ask the dog", "may tell a song"]
PAIRS = [(f"the {noun} he {end}", f"the {noun} she {end}") for end in ENDS for noun in ("cat", "dog")]
NEUTRAL = ["water fire earth sun moon star", "one two three four five six seven", "red blue green small big"]
PLANS = ("projection", "inlp", "sentence_debias", "leace")


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"]()


def states(model: Any, span: str, texts: list[tuple[str, str]] = PAIRS, site: Site = SITE) -> Tensor:
    """[2 * pairs, width] pooled activations; the first texts of pairs are the even rows."""
    contrast = contrast_of(texts, tiny_tokenizer(), least=1)
    return read_moments(model, contrast, [site], span, {"texts"}, False)[site].collected().double()


def fitted(name: str, model: Any, **options: Any) -> Any:
    return fit_mitigation(name, model, PAIRS, tokenizer=tiny_tokenizer(), site=str(SITE), **{"span": "response", **options})


def test_projection_puts_every_activation_where_neutral_text_is_along_the_mean_difference(model: Any) -> None:
    x = states(model, "response")
    gap = (x[0::2] - x[1::2]).mean(0)
    neutral = states(model, "response", [(text, f"{text} .") for text in NEUTRAL])
    lengths = torch.tensor([len(text.split()) - 1.0 for text in NEUTRAL], dtype=torch.float64)
    expected = (neutral[0::2].T @ lengths / lengths.sum()) @ gap
    with fitted("projection", model, neutral=NEUTRAL).acting(model):
        edited = states(model, "response")
    assert torch.allclose(edited @ gap, expected.expand(len(edited)), atol=1e-4)
    away = torch.eye(len(gap), dtype=torch.float64) - torch.outer(gap, gap) / gap.square().sum()
    assert torch.allclose(edited @ away, x @ away, atol=1e-4), "it moved something else too"


def test_about_the_pairs_keeps_their_mean_and_about_zero_removes_it(model: Any) -> None:
    x = states(model, "response")
    gap = (x[0::2] - x[1::2]).mean(0)
    for about, expected in (("pairs", x.mean(0) @ gap), ("zero", torch.zeros(()).double())):
        with fitted("projection", model, about=about).acting(model):
            edited = states(model, "response")
        assert torch.allclose(edited @ gap, expected.expand(len(edited)), atol=1e-4), about


def test_inlp_is_the_papers_loop(model: Any) -> None:
    x = states(model, "response")
    labels = torch.tensor([1, 0] * len(PAIRS))
    remaining, rows = x - x.mean(0), []
    for _ in range(3):
        scale = remaining.square().mean().sqrt()  # the classifier's penalty is for activations of mean square 1
        weight = torch.from_numpy(LogisticRegression(max_iter=1000).fit((remaining / scale).float().numpy(), labels).coef_[0]).double()
        rows.append(weight / weight.norm())
        remaining = remaining - torch.outer(remaining @ rows[-1], rows[-1])
    projector = torch.eye(x.shape[1], dtype=torch.float64)
    for row in rows:
        projector = projector @ (torch.eye(len(row), dtype=torch.float64) - torch.outer(row, row))
    mitigation = fitted("inlp", model, classifiers=3)
    with mitigation.acting(model):
        edited = states(model, "response")
    assert torch.allclose(edited, x @ projector, atol=2e-3 * float(x.abs().max()))
    accuracies = mitigation.facts["training_accuracy"][str(SITE)]
    assert len(accuracies) == 3 and accuracies[0] == 1.0


def test_inlp_stops_where_nothing_tells_the_groups_apart() -> None:
    from steer.bias.mitigation.inlp import classifier_weights
    from steer.directions.moments import ContrastMoments

    x = torch.zeros(40, 6)
    x[:, :3] = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[20:, :3] = x[:20, :3]  # both groups alike, but for one dimension
    x[:20, 3] = 1.0
    moments = ContrastMoments(torch.arange(40) < 20, False, ("texts",))
    moments.update(x[:, None], torch.ones(40, 1), torch.arange(40))
    rows, accuracies = classifier_weights(moments, 4, SITE)
    assert accuracies == [1.0] and rows.shape == (1, 6) and abs(float(rows[0, 3])) > 0.999


def test_sentence_debias_subtracts_the_first_components_of_pair_centred_unit_sentences(model: Any) -> None:
    x = states(model, "response")
    unit = (x / x.norm(dim=1, keepdim=True)).view(-1, 2, x.shape[1])
    pca = PCA(2).fit((unit - unit.mean(1, keepdim=True)).flatten(0, 1).numpy())
    components = torch.from_numpy(pca.components_)
    mitigation = fitted("sentence_debias", model, components=2)
    with mitigation.acting(model):
        edited = states(model, "response")
    assert torch.allclose(edited, x - x @ components.T @ components, atol=1e-4)
    assert mitigation.facts["share_of_variance"][str(SITE)] == pytest.approx(float(pca.explained_variance_ratio_.sum()), abs=1e-4)


def test_leace_is_the_eraser_of_the_directions_room(model: Any) -> None:
    mitigation = fitted("leace", model)
    erasure = fit_erasure(model, contrast_of(PAIRS, tiny_tokenizer(), least=2), [str(SITE)], span="response", progress=False)[SITE]
    x = states(model, "response")
    with mitigation.acting(model):
        edited = states(model, "response")
    assert torch.allclose(edited.float(), erasure(x.float()), atol=1e-4)
    assert torch.allclose(edited[0::2].mean(0), edited[1::2].mean(0), atol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_a_fit_says_what_it_was_made_of_and_leaves_the_model_alone(name: str, model: Any, tmp_path: Any) -> None:
    ids = torch.tensor([[8, 9, 10, 11]])
    before = model(ids).logits
    mitigation = fitted(name, model)
    again, other = fitted(name, model), fit_mitigation(name, model, PAIRS[:-1], tokenizer=tiny_tokenizer(), site=str(SITE), span="response")
    assert torch.equal(model(ids).logits, before)
    with mitigation.acting(model):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert mitigation.facts["texts"] == 2 * len(PAIRS) and mitigation.facts["sites"] == [str(SITE)] and mitigation.facts["method"] == name
    assert mitigation.facts["texts_sha256"] == again.facts["texts_sha256"] != other.facts["texts_sha256"]
    assert str(SITE) in mitigation.describe()
    steer.Plan.load(mitigation.plan.save(tmp_path / "plan")).validate(model)


def test_a_pattern_gives_each_site_a_fit_of_its_own_and_no_site_a_late_one(model: Any) -> None:
    several = fit_mitigation("projection", model, PAIRS, tokenizer=tiny_tokenizer(), site="layers.*.output", span="response")
    assert several.facts["sites"] == ["layers.0.output", "layers.1.output", "layers.2.output"]
    first, last = (several.plan.interventions[i].operator.tensors["right"] for i in (0, 2))
    assert not torch.allclose(first, last, atol=0.1)
    assert fit_mitigation("projection", model, PAIRS, tokenizer=tiny_tokenizer(), span="response").facts["sites"] == ["layers.2.output"]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("texts", "options", "error", "said"),
    [
        (PAIRS[:1], {}, ContrastError, "too few pairs"),
        ([], {}, ContrastError, "too few pairs"),
        ([*PAIRS[:3], ("he is good", "")], {}, ContrastError, "pair 3"),
        ([*PAIRS[:12], ("he is good", "he is good")], {}, ContrastError, "both sides"),
        ("he", {}, ConfigError, "pairs of a mitigation"),
        (PAIRS, {"site": "layers.9.output"}, SiteError, "layers.9"),
        (PAIRS, {"site": []}, ConfigError, "no site"),
        (PAIRS, {"site": "layers.0.input", "span": 0}, ContrastError, "differ|erased"),
        (PAIRS, {"sites": "layers.1.output"}, ConfigError, "no option 'sites'"),
        (PAIRS, {"span": "answer"}, ConfigError, "unknown span"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_fitted_is_refused(name: str, texts: Any, options: dict[str, Any], error: type, said: str, model: Any) -> None:
    with pytest.raises(error, match=said):
        fit_mitigation(name, model, texts, tokenizer=tiny_tokenizer(), **{"site": str(SITE), "span": "response", **options})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("projection", {"about": "mean"}, "about"),
        ("projection", {"about": "zero", "neutral": NEUTRAL}, "not used"),
        ("projection", {"neutral": []}, "no neutral text"),
        ("inlp", {"classifiers": 0}, "classifiers"),
        ("inlp", {"classifiers": len(PAIRS)}, "too few pairs"),
        ("sentence_debias", {"components": 0}, "components"),
        ("sentence_debias", {"components": 40}, "too few pairs"),
        ("zipf", {}, "unknown mitigation"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], said: str, model: Any) -> None:
    with pytest.raises((ConfigError, ContrastError), match=said):
        fitted(name, model, **options)


def test_groups_without_pairs_are_taken_where_a_method_needs_none(model: Any) -> None:
    sides = [tuple(pair[side] for pair in PAIRS) for side in (0, 1)]
    paired = contrast_of(PAIRS, tiny_tokenizer(), least=2)
    groups = ContrastSet(paired.positive[:-1], paired.negative, paired=False)
    assert len(sides[0]) == len(groups.negative)
    for name in ("projection", "inlp", "leace"):
        assert fit_mitigation(name, model, groups, tokenizer=tiny_tokenizer(), site=str(SITE), span="response").facts["paired"] is False
    with pytest.raises(ContrastError, match="two texts of a pair"):
        fit_mitigation("sentence_debias", model, groups, tokenizer=tiny_tokenizer(), site=str(SITE), span="response")


def test_texts_of_the_fit_have_no_word_of_the_factual_test() -> None:
    used = [text for pair in [*gender_prompts(), *gender_sentences()] for text in pair]
    assert len(set(used)) == len(used) > 100
    words = {word for text in used for word in text.lower().strip(".").split()}
    assert {word for pair in SELECT for word in pair} <= words and not {word for pair in TEST for word in pair} & words


def test_every_mitigation_is_listed() -> None:
    assert set(PLANS) <= set(mitigations()) == set(MITIGATIONS)
