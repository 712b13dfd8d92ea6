"""Sign flips of items: p as in steer.drift, an interval that says the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from steer.drift.statistics import sign_flip_p
from steer.experiment.sign_flips import sign_flips


def by_definition(x: np.ndarray, mean: float) -> float:
    """p of one mean, all 2^n patterns written out."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(x))))
    sums = abs(signs @ (x - mean))
    return float((sums >= abs((x - mean).sum()) - 1e-9).mean())


@pytest.mark.parametrize("n", [5, 8, 11])
def test_the_interval_holds_the_means_that_are_not_rejected(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n) + 0.4
    test = sign_flips(x, alpha=0.1)
    assert test.p == by_definition(x, 0.0)
    for inside, outside in ((test.low + 1e-6, test.low - 1e-6), (test.high - 1e-6, test.high + 1e-6)):
        assert by_definition(x, inside) > 0.1 >= by_definition(x, outside)


@settings(deadline=None, max_examples=60)
@given(
    x=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, -0.1, -0.3, 1.0, 1e-7]), min_size=2, max_size=18),
    alpha=st.sampled_from([0.01, 0.05, 0.0625, 0.1, 0.5]),
)
def test_zero_lies_outside_exactly_when_p_is_at_most_alpha(x: list[float], alpha: float) -> None:
    values = np.array(x)
    test = sign_flips(values, alpha=alpha, draws=199)
    assert (test.low > 0 or test.high < 0) == (test.p <= alpha)
    assert test.p == pytest.approx(float(sign_flip_p(torch.tensor(values)[:, None], draws=199)))
    assert test.low <= values.mean() + 1e-12 and values.mean() - 1e-12 <= test.high and test.smallest_p <= test.p <= 1


def test_too_few_items_have_no_bound() -> None:
    test = sign_flips(np.array([1.0, 1.1, 1.2, 1.3, 1.4]), alpha=0.05)
    assert (test.low, test.high) == (-np.inf, np.inf) and test.p == test.smallest_p == 1 / 16
    assert sign_flips(np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), alpha=0.05).low > 0


@pytest.mark.parametrize("n", [9, 24])
def test_coverage_and_size(n: int) -> None:
    """600 samples of heavy tails (t with 3 degrees of freedom): at least 93 % covered; a true null rejected in at most 7 %."""
    samples = np.random.default_rng(n).standard_t(3, size=(600, n))
    tests = [sign_flips(x, alpha=0.05, draws=499) for x in samples]
    covered = np.mean([test.low <= 0 <= test.high for test in tests])
    assert 0.93 <= covered <= 0.98 and np.mean([test.p <= 0.05 for test in tests]) == pytest.approx(1 - covered)


@pytest.mark.parametrize("factor", [1e-200, 1e200, -1.0])
def test_the_unit_changes_nothing(factor: float) -> None:
    x = np.random.default_rng(1).normal(size=20) + 0.5
    test, scaled = sign_flips(x, alpha=0.05), sign_flips(x * factor, alpha=0.05)
    assert scaled.p == test.p and sorted((test.low * factor, test.high * factor)) == pytest.approx([scaled.low, scaled.high])


def test_no_variation() -> None:
    constant = sign_flips(np.full(20, 0.1), alpha=0.05)
    assert (constant.low, constant.high) == pytest.approx((0.1, 0.1)) and constant.p == 1e-4
    nothing = sign_flips(np.zeros(20), alpha=0.05)
    assert (nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(("better", "worse", "same"), [(8, 2, 3), (9, 0, 0), (3, 3, 2), (0, 0, 5), (30, 14, 20), (60, 30, 0)])
def test_of_two_sets_of_answers_it_is_mcnemars_exact_test(better: int, worse: int, same: int) -> None:
    """Right or wrong in two arms: only the items count in which they differ, by a binomial test. Above 14 items by random patterns."""
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * same)
    exact = 1.0 if better + worse == 0 else binomtest(better, better + worse).pvalue
    spread = 0.0 if len(differences) <= 14 else 4 * (exact * (1 - exact) / 10_000) ** 0.5 + 1e-4
    assert sign_flips(differences, alpha=0.05).p == pytest.approx(exact, abs=1e-12 + spread)
