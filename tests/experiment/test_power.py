"""What a design can show, against simulation and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from steer.errors import ConfigError
from steer.experiment.crossed import Variances, mean_squares, satterthwaite
from steer.experiment.power import items_needed, seeds_needed, smallest_effect

TONE = Variances(items=0.036, seeds=0.01, residual=0.02)


@pytest.mark.parametrize(("items", "seeds"), [(24, 5), (24, 10), (100, 6)])
def test_the_smallest_effect_is_shown_with_the_power_that_it_says(items: int, seeds: int) -> None:
    """3,000 experiments whose true effect is the smallest one: 80 % show it, give or take 5."""
    effect = smallest_effect(TONE, items, seeds)
    generator = np.random.default_rng(items)
    parts = ((TONE.items, (items, 1)), (TONE.seeds, (1, seeds)), (TONE.residual, (items, seeds)))
    tables = effect + sum(variance**0.5 * generator.normal(size=(3000, *shape)) for variance, shape in parts)
    variance, df = satterthwaite(mean_squares(tables), items, seeds)
    shown = 2 * stats.t.sf(abs(tables.mean((1, 2))) / variance**0.5, df) <= 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.05)


def test_one_seed_is_the_formula_of_a_t_test_over_items() -> None:
    found = smallest_effect(Variances(0.25, None, None), 40, 1, alpha=0.1, power=0.9)
    assert found == pytest.approx((stats.t.ppf(0.95, 39) + stats.t.ppf(0.9, 39)) * 0.5 / math.sqrt(40))


def test_the_tone_experiment() -> None:
    """Documented design: about .30, .19, .15 nat per token at 3, 5, 10 seeds of 24 items."""
    assert [smallest_effect(TONE, 24, seeds) for seeds in (3, 5, 10)] == pytest.approx([0.30, 0.19, 0.15], abs=0.01)


def test_more_of_both_shows_less() -> None:
    by_items, by_seeds = ([smallest_effect(TONE, *design) for design in designs] for designs in (
        [(n, 5) for n in (8, 16, 64, 1000)], [(24, s) for s in (2, 3, 5, 20, 100)]
    ))  # fmt: skip
    assert by_items == sorted(by_items, reverse=True) and by_seeds == sorted(by_seeds, reverse=True)


@pytest.mark.parametrize("effect", [0.1, 0.15, 0.2, 0.5, 2.0])
def test_what_is_needed_is_the_least_that_suffices(effect: float) -> None:
    items, seeds = items_needed(TONE, effect, seeds=20), seeds_needed(TONE, effect, items=100)
    for needed, design in ((items, (items.items, 20)), (seeds, (100, seeds.seeds))):
        assert smallest_effect(TONE, *design) == needed.reached <= effect
    assert items.items == 2 or smallest_effect(TONE, items.items - 1, 20) > effect
    assert seeds.seeds == 2 or smallest_effect(TONE, 100, seeds.seeds - 1) > effect


def test_no_number_of_items_repairs_few_seeds() -> None:
    """(Δ / (t + t))² <= σ²_S / s: with endless items the seeds' own error is left."""
    least = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * math.sqrt(0.01 / 3)
    needed = items_needed(TONE, 0.9 * least, seeds=3)
    assert needed.items is None and needed.reached == pytest.approx(least, rel=0.01)
    assert needed.statement.startswith("no number of items suffices for 0.279 with 3 seeds") and needed.statement.endswith("add seeds")
    assert items_needed(TONE, 1.1 * least, seeds=3).items is not None


def test_no_number_of_seeds_repairs_few_items() -> None:
    needed = seeds_needed(TONE, 0.05, items=24)
    assert needed.seeds is None and needed.statement.endswith("add items")
    assert items_needed(Variances(0.09, None, None), 0.1, seeds=1).statement.endswith("× one seed show an effect of 0.1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smallest_effect(Variances(0.1, None, None), 20, 3), "one seed says nothing"),
        (lambda: smallest_effect(Variances(-0.1, 0.0, 0.0), 20, 3), "variance of items"),
        (lambda: smallest_effect(Variances(0.1, math.nan, 0.0), 20, 3), "variance of seeds"),
        (lambda: smallest_effect(TONE, 1, 3), "items"),
        (lambda: smallest_effect(TONE, 20, 0), "seeds"),
        (lambda: smallest_effect(TONE, 20, 3, power=80), "power is no share"),
        (lambda: items_needed(TONE, 0.0, 3), "effect to be shown"),
        (lambda: seeds_needed(TONE, -0.1, 24), "effect to be shown"),
    ],
)
def test_bad_designs(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
