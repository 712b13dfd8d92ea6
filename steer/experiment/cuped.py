"""Adjustment of paired differences for what was known of the items before: CUPED."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from steer.errors import ConfigError
from steer.experiment.stats import Array, Table, Values, items_and_seeds


@dataclass(frozen=True)
class Adjusted:
    """Differences adjusted for a covariate of their items.

    Attributes:
        differences: [items, seeds]; what to estimate from.
        theta: slope of the differences on the covariate.
        correlation: between an item's mean difference and its covariate.
        variance_reduction: share of the items' variance that the adjustment takes from the mean; 0 without a larger pool.
    """

    differences: Array = field(repr=False, compare=False)
    theta: float
    correlation: float
    variance_reduction: float


def cuped(differences: Table, covariate: Values, pool: Values | None = None) -> Adjusted:
    """Paired differences less what a covariate of the items explains (CUPED: Deng et al. 2013, doi 10.1145/2433396.2433413).

    The items of an experiment are often drawn from a larger pool of which the base model's scores are known. Where the drawn items happen
    to be harder than the pool, the mean difference is moved by theta times the distance of the two means, and the spread that the
    covariate explains shrinks to that of a mean over the pool. In a paired design both arms have the same items, so without a larger pool
    there is nothing to correct: the mean stays, and an interval made from residuals alone would be too narrow for new items. Then the
    differences come back as they are, with theta and the correlation for the record.

    Args:
        differences: [items, seeds] or [items].
        covariate: [items], known before the experiment, such as the score of the base model.
        pool: [N], the covariate of all items that the experiment's were drawn from at random, these included; N > items.

    Raises:
        ConfigError: a covariate that does not fit the items or does not vary; a pool smaller than the items; fewer than four items.

    Example:
        >>> cuped([0.2, 0.4, 0.6, 0.9], [1.0, 2.0, 3.0, 4.0], pool=np.arange(100) / 20).theta
        0.23
    """
    table, x = items_and_seeds(differences, "differences"), items_and_seeds(covariate, "the covariate")
    if len(table) < 4 or x.shape != (len(table), 1):
        raise _unfit_covariate(x.shape, len(table))
    of_item, x = table.mean(1), x[:, 0]  # [items] both
    deviations = x - x.mean()
    spread = float(deviations @ deviations)
    if spread <= 1e-24 * float(x @ x):
        raise _constant_covariate(float(x[0]))
    theta = float(deviations @ of_item) / spread
    of_differences = float(((of_item - of_item.mean()) ** 2).sum())
    correlation = theta * math.sqrt(spread / of_differences) if of_differences > 0 else 0.0
    if pool is None:
        return Adjusted(table, theta, correlation, 0.0)
    whole = items_and_seeds(pool, "the pool's covariate")[:, 0]  # [N]
    items = len(x)
    if len(whole) < items:
        raise _pool_too_small(len(whole), items)
    if len(whole) == items:
        return Adjusted(table, theta, correlation, 0.0)
    shift = float(whole.mean() - x.mean())
    residual = of_item - of_item.mean() - theta * deviations
    # A fitted slope takes a degree of freedom from the residuals and is extrapolated to the pool's mean.
    residual = residual * math.sqrt((items - 1) / (items - 2) * (1 + items * shift**2 / spread))
    explained = theta * deviations * math.sqrt(items / len(whole))  # a mean over N items varies as much as one over n of this size
    adjusted = of_item.mean() + theta * shift + residual + explained  # [items]
    before, after = float(np.var(of_item)), float(np.var(adjusted))
    return Adjusted(table + (adjusted - of_item)[:, None], theta, correlation, 1 - after / before if before > 0 else 0.0)


# ---- errors


def _unfit_covariate(shape: tuple[int, ...], items: int) -> ConfigError:
    remedy = "give one number for each item, in the order of the differences, or leave the covariate out"
    found = f"{items} items, covariate {list(shape)}"
    return ConfigError("the covariate does not fit the items", expected="four items or more, a number for each", found=found, remedy=remedy)


def _constant_covariate(value: float) -> ConfigError:
    remedy = "leave it out, or take one that differs between items"
    return ConfigError("the covariate explains nothing", expected="values that vary", found=f"{value:g} throughout", remedy=remedy)


def _pool_too_small(pool: int, items: int) -> ConfigError:
    remedy = "give the covariate of all items that the experiment's were drawn from, these included"
    return ConfigError("the pool is smaller than the experiment", expected=f"more than {items} items", found=pool, remedy=remedy)
