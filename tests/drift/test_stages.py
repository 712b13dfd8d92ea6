"""Stage comparison: numbers by the definition, changes that were planted are found, and chance is held to alpha."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import VOCABULARY
from drift.feature_helpers import FEATURES, dictionary, features_of, numbers
from scipy import stats
from torch import Tensor

from steer.drift.stage_tests import StageTests, sign_flips_of_features
from steer.drift.stages import compare_features, compare_text_means, text_means
from steer.errors import ConfigError
from steer.features.activations.topk import TopK
from steer.model.tokens import Row
from steer.report import stage_figure

Tiny = Callable[[str], Any]


def texts(n: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (n,), generator=generator).tolist()
    return [Row(tuple(torch.randint(7, VOCABULARY, (length,), generator=generator).tolist()), length) for length in lengths]


def moved_along(model: Any, row: Tensor, size: float) -> Any:
    """The same model, all of whose tokens begin further along a row."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight += size * row
    return other


def of(differences: Tensor, **options: Any) -> StageTests:
    """Tests of differences [texts, features]."""
    options = {"alpha": 0.05, "draws": 999, "seed": 0, **options}
    return sign_flips_of_features(
        lambda run: (differences[:, run], (differences[:, run] != 0).any(0)), differences.shape[1], len(differences), **options
    )


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_means_and_tests_are_those_of_whole_encoding(tiny: Tiny, activation: str) -> None:
    model, rows = tiny("llama").eval(), texts(10)
    own = dictionary(TopK(6) if activation == "topk" else None, first=1)
    other = moved_along(model, own.encoder_rows([3])[0], 0.02)
    result = compare_features(own, model, other, rows)
    a, b = (torch.stack([f.mean(0) for f in features_of(each, rows, own, first=1)]) for each in (model, other))
    torch.testing.assert_close(result.mean_a, a.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.change, (b - a).mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.tests.sd, (b - a).std(0), rtol=1e-3, atol=1e-5)
    assert result.tested == int(((a != 0) | (b != 0)).any(0).sum()) and result.texts == 10
    for i in result.tests.tested.nonzero()[:3, 0].tolist():
        exact = stats.permutation_test((b[:, i] - a[:, i],), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True)
        assert float(result.tests.p[i]) == pytest.approx(exact.pvalue, abs=2 / 512)
    assert set(result.table(3)[0]) >= {"feature", "change", "low", "high", "p", "q", "p_adjusted"}


def test_a_planted_change_is_found_among_all_features(tiny: Tiny) -> None:
    model, own, rows = tiny("llama").eval(), dictionary(), texts(60)
    row = own.encoder_rows([3])[0]
    result = compare_features(own, model, moved_along(model, row, 0.05), rows)
    assert 3 in result.moved and result.table(1)[0]["change"] != 0
    low, high = result.intervals
    outside = ((low > 0) | (high < 0)).nonzero()[:, 0].tolist()
    assert sorted(result.moved) == outside, "an interval leaves out 0 exactly where the feature moved"
    assert "features moved" in result.summary() and f"of {result.tested} features" in result.summary()


def test_the_same_model_twice_moves_nothing(tiny: Tiny) -> None:
    model, rows = tiny("llama").eval(), texts(20)
    result = compare_features(dictionary(), model, model, rows)
    assert result.moved == [] and result.uncorrected == 0 and float(result.change.abs().max()) == 0.0
    assert set(result.tests.p_adjusted[result.tests.tested].tolist()) == {1.0}


@pytest.mark.parametrize("n", [12, 40])
def test_chance_flags_one_comparison_in_twenty(n: int) -> None:
    """Differences whose sign is random: zero-inflated, with heavy tails, some of them on in few texts, some correlated."""
    flagged, uncorrected, predicted = 0, [], []
    trials, features = 200, 60
    rate = torch.linspace(0.1, 1.0, features)
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        size = torch.randn(n, features, generator=generator).exp() * (torch.rand(n, features, generator=generator) < rate)
        size[:, 40:] = size[:, 40:41]
        signs = torch.randint(0, 2, (n, features), generator=generator) * 2 - 1
        signs[:, 40:] = signs[:, 40:41]
        result = of((size * signs).double(), draws=499)
        flagged += bool((result.p_adjusted <= 0.05).any())
        uncorrected.append(int((result.p <= 0.05).sum()))
        predicted.append(result.by_chance)
    assert flagged <= stats.binom.ppf(0.999, trials, 0.05)
    assert sum(uncorrected) / trials == pytest.approx(sum(predicted) / trials, abs=1.0)
    assert sum(uncorrected) / trials > 1.0, "without a correction chance gives some in every comparison"


def test_two_random_halves_of_the_differences_between_stages_move_nothing(tiny: Tiny) -> None:
    """Two stages, exchanged at random in half of the texts: no stage is above the other, whatever moved."""
    model, own, rows = tiny("llama").eval(), dictionary(), texts(30)
    readings = [text_means(own, each, rows) for each in (model, moved_along(model, own.encoder_rows([3])[0], 0.05))]
    a, b = (reading.columns(slice(0, FEATURES), torch.arange(30)) for reading in readings)
    assert len(compare_text_means(*readings).moved) > 0
    flagged = 0
    for trial in range(60):
        signs = torch.randint(0, 2, (30, 1), generator=torch.Generator().manual_seed(trial)) * 2 - 1
        flagged += bool((of((b - a) * signs, seed=1).p_adjusted <= 0.05).any())
    assert flagged <= stats.binom.ppf(0.999, 60, 0.05)


def test_readings_of_other_texts_or_spans_are_not_compared(tiny: Tiny) -> None:
    model, own, rows = tiny("llama").eval(), dictionary(), texts(8)
    first = text_means(own, model, rows)
    for other in (text_means(own, model, texts(9)[1:]), text_means(own, model, rows, span="last")):
        with pytest.raises(ConfigError, match="other tokens, or another span"):
            compare_text_means(first, other)


def test_chunks_of_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = numbers(20, 50, seed=1).double() * (numbers(20, 50, seed=2) > 0)
    whole = of(differences)
    monkeypatch.setattr("steer.drift.stage_tests.CHUNK", 7)
    parts = of(differences)
    for name in ("p", "q", "p_adjusted", "sd", "changed"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    assert (parts.critical_t, parts.by_chance) == pytest.approx((whole.critical_t, whole.by_chance))


def test_what_is_kept_grows_with_the_features_that_are_on() -> None:
    """Not with tokens times features."""
    from steer.drift.stages import TextMeans

    own = dictionary(TopK(2))
    means = TextMeans(own, torch.zeros(3, dtype=torch.long))
    means.update(numbers(3, 50, 32, seed=1), torch.ones(3, 50), torch.tensor([2, 0, 1]))
    means.finish()
    assert len(means.places) <= 3 * FEATURES and len(means.places) < 50 * FEATURES
    assert torch.equal(means.places, means.places.sort().values)


def test_the_picture_names_what_moved_and_what_chance_gives(tiny: Tiny, tmp_path: Path) -> None:
    model, own, rows = tiny("llama").eval(), dictionary(), texts(60)
    result = compare_features(own, model, moved_along(model, own.encoder_rows([3])[0], 0.05), rows)
    svg = stage_figure(result, tmp_path / "stages.svg", most=5).read_text()
    assert f"{len(result.moved)} of {result.tested} features moved" in svg
    assert all(f">{row['feature']:.0f}<" in svg for row in result.table(5))
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        stage_figure(result, tmp_path / "stages.pdf")


def test_what_cannot_be_compared_is_refused(tiny: Tiny) -> None:
    model, own = tiny("llama"), dictionary()
    with pytest.raises(ConfigError, match=r"too few texts[\s\S]*6 or more[\s\S]*found: 5"):
        compare_features(own, model, model, texts(5))
    with pytest.raises(ConfigError, match="no level"):
        compare_features(own, model, model, texts(8), alpha=5)
    with pytest.raises(ConfigError, match=r"cannot be compared[\s\S]*8 and 9 texts, one dictionary"):
        compare_text_means(text_means(own, model, texts(8)), text_means(own, model, texts(9)))
    with pytest.raises(ConfigError, match="the dictionary"):
        compare_features([1], model, model, texts(8))  # type: ignore[arg-type]
