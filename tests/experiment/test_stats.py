"""Numbers that arrive from outside, Student's interval, numbers in sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.stats import between_0_and_1, interval, items_and_seeds, paired, written


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


def test_without_variation_the_interval_is_the_mean() -> None:
    assert interval([7.0, 7.0]).low == interval([7.0, 7.0]).high == 7.0


@settings(deadline=None, max_examples=40)
@given(x=st.lists(st.sampled_from([0.0, 1.0, 1e-300, -5.0, 1e12]), min_size=2, max_size=5))
def test_tiny_samples_give_a_finite_interval_around_the_mean(x: list[float]) -> None:
    bounds = interval(x)
    assert np.isfinite([bounds.low, bounds.high]).all() and bounds.low <= bounds.mean <= bounds.high
    assert (bounds.low == bounds.high) == (min(x) == max(x))


def test_numbers_keep_their_sign_near_zero() -> None:
    assert written(-0.31, -0.704, 0.08, signed=True) == ["-0.31", "-0.70", "+0.08"]
    assert written(0.2, -0.001, 0.4) == ["0.200", "-0.001", "0.400"]
    assert written(0.2, -0.0001, 0.0, signed=True) == ["+0.2000", "-0.0001", "0.0000"]


@pytest.mark.parametrize("of", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)])
def test_tables_come_as_lists_arrays_and_tensors(of) -> None:
    table = items_and_seeds(of([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), "scores")
    assert table.shape == (3, 2) and table.dtype == np.float64
    np.testing.assert_allclose(table, [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], rtol=1e-6 if of is torch.tensor else 1e-15)
    assert items_and_seeds(of([0.1, 0.2]), "scores").shape == (2, 1), "a plain list is one seed"


@pytest.mark.parametrize(
    "missing", [[[1.0, 2.0], [3.0]], [1.0, None], [[1.0, None], [2.0, 3.0]], ["1", "2"], "12", np.zeros((2, 3, 4)), [[], []], 3.0, {}]
)
def test_a_missing_cell_is_no_number(missing: object) -> None:
    with pytest.raises(ConfigError, match="scores are no table") as error:
        items_and_seeds(missing, "scores")  # type: ignore[arg-type]
    assert None not in (error.value.expected, error.value.found, error.value.remedy)


@pytest.mark.parametrize("few", [[], [1.0], [[1.0, 2.0, 3.0]]])
def test_one_item_is_too_few(few: list[float]) -> None:
    with pytest.raises(ConfigError, match="too few scores"):
        items_and_seeds(few, "scores")


def test_a_number_that_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteError, match="scores are not finite") as error:
        items_and_seeds([[1.0, 2.0], [3.0, float("nan")]], "scores")
    assert error.value.found == "nan at item 1, seed 1"
    with pytest.raises(NonFiniteError) as error:
        interval([1.0, float("inf")])
    assert error.value.found == "inf at item 1"


def test_arms_of_other_items_or_seeds_cannot_be_paired() -> None:
    with pytest.raises(ConfigError, match="gap of a and b cannot be paired") as error:
        paired([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0], "gap", "a", "b")
    assert error.value.found == "2 items, 2 seeds and 2 items, 1 seed"
    with pytest.raises(NonFiniteError, match="gap of b"):
        paired([1.0, 2.0], [1.0, float("nan")], "gap", "a", "b")


@pytest.mark.parametrize("value", [0, 1, 95, -0.1, float("nan"), "0.95", True])
def test_a_level_in_percent_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="level is no share"):
        between_0_and_1(value, "level")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((3.2e-5, 1.1e-5, 5.3e-5), ["+3.2e-05", "+1.1e-05", "+5.3e-05"]),
        ((2.4e300, -3.7e299), ["+2.4e+300", "-3.7e+299"]),
        ((0.4, 0.0002, 0.8), ["+0.4000", "+0.0002", "+0.8000"]),
        ((0.5, 1e-17), ["+0.50", "0.00"]),
        ((0.0, 0.0), ["0.00", "0.00"]),
    ],
)
def test_numbers_of_any_size_can_be_read_and_show_on_which_side_of_zero_they_lie(values: tuple[float, ...], texts: list[str]) -> None:
    assert written(*values, signed=True) == texts
