"""Statistics of an experiment: what they claim, and what they do when the numbers are degenerate."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.stats import Comparison, compare, holm, interval, written


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=n))


def test_the_interval_is_scipys_for_the_mean() -> None:
    x = normal(40) + 3
    bounds = interval(x)
    expected = stats.ttest_1samp(x.numpy(), 0).confidence_interval(0.95)
    assert (bounds.low, bounds.high) == pytest.approx(expected)
    assert bounds.mean == pytest.approx(float(x.mean())) and bounds.n == 40
    assert interval(x * 1e-200).high == pytest.approx(bounds.high * 1e-200, rel=1e-9)


@pytest.mark.parametrize("n", [2, 4, 8, 24, 36])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    """2,000 samples of normal items: 95 % give or take three standard errors of a simulation of this size."""
    samples = np.random.default_rng(n).normal(size=(2000, n)) + 1
    covered = [bounds.low <= 1 <= bounds.high for bounds in map(interval, samples)]
    assert abs(np.mean(covered) - 0.95) <= 3 * (0.95 * 0.05 / 2000) ** 0.5


def test_the_interval_of_skewed_items() -> None:
    """200 samples of 30: 95 % intervals of a skewed law (exponential) cover its mean in 90 % or more."""
    samples = np.random.default_rng(0).exponential(size=(200, 30))
    covered = [bounds.low <= 1 <= bounds.high for bounds in map(interval, samples)]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_pairing_removes_what_the_items_share() -> None:
    items = normal(30) * 5
    paired = compare("gap", "b", "c", items - 0.3 + 0.1 * normal(30, 1), items, unit="nat/token")
    assert paired.shown and paired.ci[1] < 0 and paired.n == 30
    assert not compare("gap", "b", "c", normal(30, 2) * 5 - 0.3, items).shown


def test_verdicts() -> None:
    lower = Comparison("gap", "b", "c", -0.31, (-0.40, -0.22), 0.0002, 24, "nat/token", p_adjusted=0.0002)
    assert lower.verdict == "gap: b is lower than c by 0.31 nat/token [0.22, 0.40], p=0.0002, n=24"
    higher = replace(lower, difference=0.31, ci=(0.22, 0.40), unit="", p_adjusted=0.0012, family=6)
    assert higher.verdict == "gap: b is higher than c by 0.31 [0.22, 0.40], p=0.0012 (Holm, 6 comparisons), n=24"
    unclear = replace(lower, ci=(-0.70, 0.08), p_adjusted=0.1)
    assert unclear.verdict == "gap: no difference shown between b and c (-0.31 nat/token [-0.70, +0.08], p=0.1, n=24)"
    few = compare("gap", "b", "c", [1.0, 1.1, 1.2, 1.3], [0.0, 0.0, 0.0, 0.0])
    assert few.p == 2 / 16 and few.verdict.startswith("gap: 4 pairs are too few to show a difference between b and c (+1.15 [")
    assert replace(higher, p_adjusted=0.051, n=7).verdict.startswith("gap: 7 pairs are too few")  # six comparisons of 1/64 at best


def test_a_difference_is_only_claimed_when_it_is_there() -> None:
    """400 comparisons of equal arms at 5 %, heavy tails: at most 7.5 % claimed; Holm over families of four brings that per family."""
    law = stats.t(2)
    equal = [compare("m", "a", "b", *law.rvs(size=(2, 12), random_state=i)) for i in range(400)]
    assert np.mean([comparison.shown for comparison in equal]) <= 0.075
    families = [any(comparison.shown for comparison in holm(equal[i : i + 4])) for i in range(0, 400, 4)]
    assert np.mean(families) <= 0.1


def test_json_form_is_stable() -> None:
    as_json = json.loads(json.dumps(compare("gap", "a", "b", normal(9), normal(9, 1), unit="nat").to_dict()))
    assert set(as_json) == {"metric", "a", "b", "difference", "ci", "p", "p_adjusted", "n", "unit", "verdict"}
    assert as_json["ci"][0] < as_json["difference"] < as_json["ci"][1]


@settings(deadline=None)
@given(p=st.lists(st.floats(0.0001, 1), min_size=1, max_size=8))
def test_holm(p: list[float]) -> None:
    """The textbook form: the k-th smallest p times (m - k + 1), made monotone, at most 1; order is kept."""
    comparisons = [Comparison("m", str(i), "b", 1.0, (0.5, 1.5), value, 20, "", p_adjusted=value) for i, value in enumerate(p)]
    adjusted = holm(comparisons)
    expected = np.minimum(1, np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)))[np.argsort(np.argsort(p, kind="stable"))]
    np.testing.assert_allclose([comparison.p_adjusted for comparison in adjusted], expected)
    assert [comparison.a for comparison in adjusted] == [comparison.a for comparison in comparisons] and {
        comparison.family for comparison in adjusted
    } == {len(p)}
    assert all(comparison.p_adjusted >= comparison.p for comparison in adjusted)


def test_numbers_keep_their_sign_near_zero() -> None:
    assert written(-0.31, -0.704, 0.08, signed=True) == ["-0.31", "-0.70", "+0.08"]
    assert written(0.2, -0.001, 0.4) == ["0.200", "-0.001", "0.400"]
    assert written(0.2, -0.0001, 0.0, signed=True) == ["+0.200", "0.000", "0.000"]
    assert "-0.00]" not in replace(compare("m", "a", "b", [1.0] * 9, [2.0] * 9), ci=(-1.0, -0.001)).verdict


def test_no_variation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = compare("m", "a", "b", [2.0] * 20, [2.0] * 20)
        shifted = compare("m", "a", "b", [2.5] * 20, [2.0] * 20)
        assert interval([7.0, 7.0]).low == interval([7.0, 7.0]).high == 7.0
    assert same.p == 1.0 and same.ci == (0.0, 0.0) and not same.shown
    assert shifted.ci == (0.5, 0.5) and shifted.p < 0.001


@settings(deadline=None, max_examples=40)
@given(x=st.lists(st.sampled_from([0.0, 1.0, 1e-300, -5.0, 1e12]), min_size=2, max_size=5))
def test_tiny_samples_give_a_finite_interval_around_the_mean(x: list[float]) -> None:
    bounds = interval(x)
    assert np.isfinite([bounds.low, bounds.high]).all() and bounds.low <= bounds.mean <= bounds.high
    assert (bounds.low == bounds.high) == (min(x) == max(x))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="too few gap of a"):
        compare("gap", "a", "b", [1.0], [2.0])
    with pytest.raises(ConfigError, match="cannot be paired"):
        compare("gap", "a", "b", [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(NonFiniteError, match="gap of b") as error:
        compare("gap", "a", "b", [1.0, 2.0], [1.0, float("nan")])
    assert error.value.found == "nan at item 1"
    with pytest.raises(NonFiniteError):
        interval([1.0, float("inf")])
