"""Items × seeds: the interval covers what it says in the designs of experiments, and degenerate tables claim nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.crossed import Variances, crossed, mean_squares, satterthwaite, whole_seed_flips

# Items, seeds, and variances of items, seeds and residual: a small model's held-out answers, and what else an experiment may look like.
DESIGNS = [
    (36, 3, 0.09, 0.0025, 0.02),
    (36, 3, 0.09, 0.01, 0.02),
    (36, 5, 0.09, 0.01, 0.02),
    (36, 10, 0.09, 0.01, 0.02),
    (36, 5, 0.09, 0.0, 0.02),
    (200, 3, 0.09, 0.01, 0.02),
    (24, 5, 0.036, 0.01, 0.02),
    (200, 5, 0.09, 0.01, 0.02),
    (36, 5, 0.09, 0.001, 0.2),
    (36, 5, 0.0, 0.01, 0.02),
    (36, 5, 0.0025, 0.0025, 0.2),
    (6, 6, 0.01, 0.01, 0.02),
    (36, 2, 0.09, 0.01, 0.02),
]


def drawn(samples: int, items: int, seeds: int, of_items: float, of_seeds: float, residual: float, seed: int = 0) -> np.ndarray:
    """[samples, items, seeds] with mean 0."""
    generator = np.random.default_rng(seed)
    parts = ((of_items, (items, 1)), (of_seeds, (1, seeds)), (residual, (items, seeds)))
    return sum(variance**0.5 * generator.normal(size=(samples, *shape)) for variance, shape in parts)


def rejected(tables: np.ndarray, alpha: float = 0.05) -> float:
    """Share of tables whose mean is called different from 0."""
    variance, df = satterthwaite(mean_squares(tables), *tables.shape[1:])
    return float((2 * stats.t.sf(abs(tables.mean((1, 2))) / variance**0.5, df) <= alpha).mean())


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_coverage(design: tuple) -> None:
    """2,500 samples (6,000 where that is quick): 93 to 97.5 % are covered; at 3 seeds or fewer 91 % would be accepted, 93 % are reached."""
    size = rejected(drawn(2500 if design[0] > 36 else 6000, *design))
    assert 0.025 <= size <= (0.055 + 2 * 0.0032 if design[1] > 3 else 0.07)


def test_coverage_where_neither_items_nor_seeds_vary() -> None:
    """Nothing but noise: a source that stands out by chance makes the interval a little wide, 97.5 %."""
    assert 0.015 <= rejected(drawn(6000, 36, 5, 0.0, 0.0, 0.02)) <= 0.05


def test_the_whole_function_agrees_with_the_simulated_formula() -> None:
    tables = drawn(200, 24, 5, 0.036, 0.01, 0.02)
    estimates = [crossed(table) for table in tables]
    assert np.mean([estimate.p <= 0.05 for estimate in estimates]) == rejected(tables)
    assert all((estimate.low > 0 or estimate.high < 0) == (estimate.p <= 0.05) for estimate in estimates)


def test_skewed_items_and_seeds() -> None:
    """Exponential effects in place of normal ones, 36 items and 5 seeds: 90 % or more are covered."""
    generator = np.random.default_rng(0)
    items, seeds, residual = (generator.exponential(size=(3000, *shape)) - 1 for shape in ((36, 1), (1, 5), (36, 5)))
    assert rejected(0.3 * items + 0.1 * seeds + 0.14 * residual) <= 0.1


def test_items_only_and_pooled_intervals_would_be_too_narrow() -> None:
    """The reason for all this: 36 items, 3 seeds; as 108 items the null is rejected in a third of the experiments."""
    tables = drawn(2000, 36, 3, 0.09, 0.01, 0.02)
    pooled = stats.ttest_1samp(tables.reshape(2000, -1), 0, axis=1).pvalue
    assert (pooled <= 0.05).mean() > 0.3 and rejected(tables) < 0.07


def test_mean_squares_are_those_of_an_analysis_of_variance() -> None:
    """The worked table of Snedecor's kind: sums of squares by hand."""
    table = np.array([[4.0, 6.0, 5.0], [8.0, 7.0, 9.0]])  # row means 5, 8; column means 6, 6.5, 7; mean 6.5
    of_items, of_seeds, residual = mean_squares(table)
    assert (of_items, of_seeds) == pytest.approx((3 * (1.5**2 + 1.5**2) / 1, 2 * (0.25 + 0 + 0.25) / 2))
    assert residual == pytest.approx(((table - 6.5) ** 2).sum() / 2 - 13.5 / 2 - 1.0 / 2)
    estimate = crossed(table)
    assert estimate.variances == Variances(*map(pytest.approx, ((13.5 - 1.5) / 3, 0.0, 1.5)))
    assert estimate.mean == 6.5 and (estimate.items, estimate.seeds) == (2, 3)


def test_variances_are_recovered() -> None:
    estimate = crossed(drawn(1, 400, 300, 0.09, 0.01, 0.02)[0])
    found = (estimate.variances.items, estimate.variances.seeds, estimate.variances.residual)
    assert found == pytest.approx((0.09, 0.01, 0.02), rel=0.25)
    assert estimate.se == pytest.approx((0.09 / 400 + 0.01 / 300 + 0.02 / 120000) ** 0.5, rel=0.15)


def test_without_a_variance_of_seeds_it_is_students_interval_of_the_items() -> None:
    """Every seed gives the same: then rows are the sample."""
    items = np.random.default_rng(0).normal(size=20)
    estimate = crossed(np.tile(items[:, None], 4), level=0.9)
    assert (estimate.low, estimate.high) == pytest.approx(stats.ttest_1samp(items, 0).confidence_interval(0.9))
    assert estimate.df == pytest.approx(19) and estimate.variances.seeds == pytest.approx(0, abs=1e-12)


def test_without_a_variance_of_items_it_is_students_interval_of_the_seeds() -> None:
    seeds = np.random.default_rng(0).normal(size=5)
    estimate = crossed(np.tile(seeds, (20, 1)))
    assert (estimate.low, estimate.high) == pytest.approx(stats.ttest_1samp(seeds, 0).confidence_interval(0.95))
    assert estimate.df == pytest.approx(4)


@settings(deadline=None, max_examples=50)
@example(table=[[0.0, 0.0, 0.0], [0.0, 1e-9, 1e-9]], level=0.5)  # the interval begins at 0
@example(table=[[0.0, 0.0], [-0.3, 1.0]], level=0.5)  # the mean square of the seeds is that of the residual
@given(
    table=st.integers(2, 6).flatmap(
        lambda seeds: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, 0.1, -0.3, 1e-9, 5.0]), min_size=seeds, max_size=seeds), min_size=2, max_size=5
        )
    ),
    level=st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_any_table_gives_an_interval_that_agrees_with_its_p(table: list[list[float]], level: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = crossed(table, level=level)
    if estimate.p != pytest.approx(1 - level, rel=1e-9):  # where an end of the interval is 0, rounding decides
        assert (estimate.low > 0 or estimate.high < 0) == (estimate.p <= 1 - level)
    assert estimate.low <= estimate.mean <= estimate.high and 0 <= estimate.p <= 1 and estimate.level == level
    turned = crossed(np.array(table).T, level=level)
    assert turned.se == pytest.approx(estimate.se, rel=1e-6, abs=1e-12), "items and seeds are treated alike"


@pytest.mark.parametrize("factor", [1e-200, 1e200, -1.0])
def test_the_unit_changes_nothing(factor: float) -> None:
    table = drawn(1, 12, 4, 0.09, 0.01, 0.02)[0] + 0.3
    one, scaled = crossed(table), crossed(table * factor)
    assert (scaled.p, scaled.df) == pytest.approx((one.p, one.df))
    assert sorted((one.low * factor, one.high * factor)) == pytest.approx([scaled.low, scaled.high])


# ---- one seed


def test_one_seed_is_a_sample_of_items_and_says_so() -> None:
    values = np.random.default_rng(0).normal(size=12) + 1
    estimate = crossed(values)
    assert estimate == crossed(values[:, None])
    assert (estimate.sample, estimate.df, estimate.variances.seeds) == ("12 items, one seed", None, None)
    assert estimate.se == pytest.approx(stats.sem(values)) and estimate.p == 4 / 2**12 and estimate.low > 0
    assert crossed(np.ones((3, 2)) + np.eye(3, 2)).sample == "3 items × 2 seeds"


# ---- whole seeds


def test_whole_seeds_are_flipped_exactly() -> None:
    """Six seeds on one side: 2 of 64 patterns are as large."""
    table = np.random.default_rng(0).normal(size=(8, 6)) * 0.01 + np.arange(1, 7)
    flips = whole_seed_flips(table)
    assert (flips.p, flips.smallest_p, flips.seeds) == (2 / 64, 2 / 64, 6)
    table[:, 0] -= 1.5  # the seed of mean 1 goes to -0.5: it and its mirror image are beaten by four patterns
    assert whole_seed_flips(table).p == 4 / 64
    assert whole_seed_flips(np.tile(np.arange(1, 13), (4, 1))).smallest_p == 2**-11


def test_whole_seeds_say_nothing_of_other_items() -> None:
    """Items differ, seeds do not, the mean over all items is 0: rejected far too often, which is why it stands beside `crossed` only."""
    tables = drawn(60, 36, 6, 0.09, 0.0, 0.02)
    assert np.mean([whole_seed_flips(table).p <= 0.05 for table in tables]) > 0.4


def test_five_seeds_are_too_few_to_flip() -> None:
    with pytest.raises(ConfigError, match="too few seeds") as error:
        whole_seed_flips(np.ones((4, 5)))
    assert error.value.found == 5 and "0.0625" in str(error.value)


# ---- degenerate


def test_no_variation_claims_no_more_than_sign_flips_could() -> None:
    few = crossed(np.full((36, 3), 0.5))
    assert (few.mean, few.p, few.se, few.low, few.high) == (0.5, 0.25, 0.0, -math.inf, math.inf) and not few.bounded
    enough = crossed(np.full((36, 8), 0.1) + 0.2 - 0.2)
    assert enough.p == 2**-7 and (enough.low, enough.high) == pytest.approx((0.1, 0.1)) and enough.bounded
    nothing = crossed(np.zeros((36, 8)))
    assert (nothing.p, nothing.low, nothing.high) == (1.0, 0.0, 0.0)


def test_two_items_and_two_seeds_that_cancel() -> None:
    """Row and column means are all equal: they say nothing of the spread, and must not make p = 0; the four cells do."""
    estimate = crossed([[2.0, 0.0], [0.0, 2.0]])
    assert estimate.p == pytest.approx(stats.ttest_1samp([2.0, 0.0, 0.0, 2.0], 0).pvalue) and estimate.df == 3
    assert crossed([[2.1, 0.0], [0.0, 2.2]]).p > 0.05


def test_bad_tables() -> None:
    with pytest.raises(NonFiniteError) as error:
        crossed([[1.0, 2.0], [math.nan, 4.0]], what="gap of a")
    assert error.value.found == "nan at item 1, seed 0" and "gap of a" in str(error.value)
    with pytest.raises(ConfigError, match="no table of numbers"):
        crossed([[1.0, 2.0], [3.0]])
    with pytest.raises(ConfigError, match="too few"):
        crossed([[1.0, 2.0, 3.0]])
    with pytest.raises(ConfigError, match="level of an interval"):
        crossed([1.0, 2.0], level=95)
