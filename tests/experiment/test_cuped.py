"""A covariate narrows the interval only by what the larger pool tells."""

from __future__ import annotations

import numpy as np
import pytest

from steer.errors import ConfigError
from steer.experiment.crossed import crossed
from steer.experiment.cuped import cuped


def drawn(generator: np.random.Generator, items: int, pool: int, rho: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences [items, 5] with a mean of 0 in the population of pools, their covariate, that of the pool."""
    x = generator.normal(size=pool)
    of_item = rho * x[:items] + (1 - rho**2) ** 0.5 * generator.normal(size=items)
    return of_item[:, None] + 0.2 * generator.normal(size=(1, 5)) + 0.3 * generator.normal(size=(items, 5)), x[:items], x


def test_theta_and_the_reduction_are_those_of_a_regression() -> None:
    d, x, pool = drawn(np.random.default_rng(0), 400, 400_000, 0.8)
    adjusted = cuped(d, x, pool)
    slope = np.polyfit(x, d.mean(1), 1)[0]
    assert adjusted.theta == pytest.approx(slope) and adjusted.correlation == pytest.approx(np.corrcoef(x, d.mean(1))[0, 1])
    assert adjusted.variance_reduction == pytest.approx(adjusted.correlation**2, abs=0.01)
    assert adjusted.differences.mean() == pytest.approx(d.mean() + slope * (pool.mean() - x.mean()))
    within = adjusted.differences - adjusted.differences.mean(1, keepdims=True)
    np.testing.assert_allclose(within, d - d.mean(1, keepdims=True), atol=1e-12, err_msg="seeds of an item stay as they are")


@pytest.mark.parametrize(("items", "pool", "rho"), [(24, 24, 0.8), (24, 48, 0.8), (24, 1000, 0.8), (24, 1000, 0.0), (100, 1000, 0.95)])
def test_coverage_over_items_that_are_drawn_anew(items: int, pool: int, rho: float) -> None:
    """600 experiments: 93 to 97.5 %, two standard errors beside it."""
    generator = np.random.default_rng(items + pool)
    covered, width, plain = 0, 0.0, 0.0
    for _ in range(600):
        d, x, whole = drawn(generator, items, pool, rho)
        estimate, unadjusted = crossed(cuped(d, x, whole).differences), crossed(d)
        covered += estimate.low <= 0 <= estimate.high
        width, plain = width + estimate.se, plain + unadjusted.se
    assert 0.93 - 0.018 <= covered / 600 <= 0.975 + 0.013
    assert width < 0.9 * plain if rho and pool > items else width <= 1.12 * plain


def test_without_a_larger_pool_nothing_is_gained() -> None:
    """Both arms have the same items, so their mean is no news: taking their spread away would make the interval too narrow."""
    d, x, _ = drawn(np.random.default_rng(0), 24, 24, 0.9)
    for adjusted in (cuped(d, x), cuped(d, x, x)):
        assert np.array_equal(adjusted.differences, d) and adjusted.variance_reduction == 0 and adjusted.correlation > 0.7


def test_bad_covariates() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        cuped(np.ones((5, 2)), [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="does not fit"):
        cuped([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="explains nothing"):
        cuped([1.0, 2.0, 3.0, 4.0], [0.1] * 4)
    with pytest.raises(ConfigError, match="pool is smaller"):
        cuped([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0], [1.0, 2.0])
