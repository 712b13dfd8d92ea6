"""Contrasts in their roles: what a verdict claims, its interval and its corrected p are one statement."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.contrasts import Contrast, _corrected, answer, benjamini_hochberg, contrast, holm, max_t
from steer.experiment.corrections import adjusted_bh, adjusted_holm, adjusted_max_t
from steer.experiment.crossed import crossed


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def family(effects: list[float], items: int, seeds: int, seed: int = 0, shared: float = 0.0) -> list[Contrast]:
    """Contrasts of arms with these effects against the base, whose scores they may share."""
    generator = np.random.default_rng(seed)

    def noise() -> np.ndarray:
        parts = ((0.3, (items, 1)), (0.1, (1, seeds)), (0.14, (items, seeds)))
        return sum(sd * generator.normal(size=shape) for sd, shape in parts)

    base = shared**0.5 * noise()
    return [
        contrast("gap", f"arm {i}", "base", effect + (1 - shared) ** 0.5 * noise(), base, alpha=0.05) for i, effect in enumerate(effects)
    ]


def agrees(one: Contrast) -> bool:
    """Shown, the corrected p, the interval and the words say the same."""
    outside = one.estimate.low > 0 or one.estimate.high < 0
    claims = " lower than " in one.verdict or " higher than " in one.verdict
    return one.shown == outside == claims == (one.p_adjusted <= one.alpha) and one.p <= one.p_adjusted


# ---- one contrast


def test_pairing_removes_what_the_items_share() -> None:
    items = normal(30) * 5
    one = contrast("gap", "b", "c", items - 0.3 + 0.1 * normal(30, seed=1), items, unit="nat/token")
    assert one.shown and one.estimate.high < 0 and one.estimate.items == 30
    assert not contrast("gap", "b", "c", normal(30, seed=2) * 5 - 0.3, items).shown


def test_verdicts() -> None:
    def of(estimate_of: list, **changes: object) -> str:
        mean, low, high, p, items, seeds, level = estimate_of
        estimate = replace(crossed(normal(12)), mean=mean, low=low, high=high, p=p, items=items, seeds=seeds, level=level)
        return replace(contrast("gap", "b", "c", normal(12), normal(12)), estimate=estimate, **changes).verdict

    plain = {"p_adjusted": 0.0002, "unit": "nat/token"}
    lower = of([-0.31, -0.40, -0.22, 0.0002, 24, 1, 0.95], **plain)
    assert lower == "gap: b is lower than c by 0.31 nat/token [0.22, 0.40], p=0.0002, 24 items, one seed"
    higher = of([0.31, 0.22, 0.40, 0.0002, 24, 5, 0.9917], p_adjusted=0.0012, correction="Holm", family=6, role="secondary")
    words = "(Holm, 6 contrasts; interval at 99.2 %)"
    assert higher == f"gap: b is higher than c by 0.31 [0.22, 0.40], p=0.0012 {words}, 24 items × 5 seeds"
    unclear = of([-0.31, -0.70, 0.08, 0.1, 24, 1, 0.95], p_adjusted=0.1, unit="nat/token")
    assert unclear == "gap: no difference shown between b and c (-0.31 nat/token [-0.70, +0.08], p=0.1, 24 items, one seed)"
    seen = of([0.31, 0.22, 0.40, 0.01, 24, 5, 0.95], p_adjusted=0.01, role="exploratory", correction="Benjamini-Hochberg")
    assert seen.endswith("p=0.01 (exploratory), 24 items × 5 seeds")


def test_too_few_items_are_said_to_be_too_few() -> None:
    few = contrast("gap", "b", "c", [1.0, 1.1, 1.2, 1.3], [0.0, 0.0, 0.0, 0.0])
    assert few.p == 2 / 16 and few.verdict.startswith("gap: 4 items are too few to show a difference between b and c (+1.15, p=0.12")
    seven = [contrast("gap", f"b{i}", "c", normal(7, seed=i) + 9, np.zeros(7)) for i in range(6)]
    assert seven[0].shown, "one contrast of seven items can be shown, p = 2/128"
    assert all("7 items are too few" in one.verdict and not one.shown for one in holm(seven)), "six at once cannot: 6 · 2/128 > 0.05"


def test_a_difference_is_only_claimed_when_it_is_there() -> None:
    """400 contrasts of equal arms at 5 %, heavy tails: at most 7.5 % claimed; Holm over families of four brings that per family."""
    law = stats.t(2)
    equal = [contrast("m", "a", "b", *law.rvs(size=(2, 12), random_state=i)) for i in range(400)]
    assert np.mean([one.shown for one in equal]) <= 0.075
    families = [any(one.shown for one in holm(equal[i : i + 4])) for i in range(0, 400, 4)]
    assert np.mean(families) <= 0.1


def test_json_form_is_strict_and_stable() -> None:
    keys = {"metric", "a", "b", "difference", "ci", "level", "p", "p_adjusted", "n", "seeds", "unit", "role", "correction", "verdict"}
    as_json = json.loads(json.dumps(contrast("gap", "a", "b", normal(9), normal(9, seed=1), unit="nat").to_dict(), allow_nan=False))
    assert set(as_json) == keys and as_json["ci"][0] < as_json["difference"] < as_json["ci"][1]
    unbounded = contrast("gap", "a", "b", [1.0, 2.0], [0.0, 0.0]).to_dict()
    assert unbounded["ci"] == [None, None] and json.dumps(unbounded, allow_nan=False)


def test_no_variation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = contrast("m", "a", "b", [2.0] * 20, [2.0] * 20)
        shifted = contrast("m", "a", "b", [2.5] * 20, [2.0] * 20)
    assert (same.p, same.estimate.low, same.estimate.high, same.shown) == (1.0, 0.0, 0.0, False)
    assert (shifted.estimate.low, shifted.estimate.high) == (0.5, 0.5) and shifted.p < 0.001 and agrees(shifted)


def test_a_covariate_is_reported() -> None:
    base = normal(30)
    of_a = 0.5 * base + 0.2 + 0.05 * normal(30, seed=1)
    pool = np.concatenate([base, normal(970, seed=2)])
    one, plain = contrast("m", "a", "b", of_a, np.zeros(30), covariate=base, pool=pool), contrast("m", "a", "b", of_a, np.zeros(30))
    assert one.adjustment is not None and one.adjustment.theta == pytest.approx(0.5, abs=0.05) and plain.adjustment is None
    assert one.adjustment.variance_reduction > 0.9 and one.estimate.se < 0.4 * plain.estimate.se and "array" not in repr(one)


# ---- corrections


@settings(deadline=None)
@given(p=st.lists(st.floats(0.0001, 1), min_size=1, max_size=8))
def test_holm(p: list[float]) -> None:
    """The textbook form: the k-th smallest p times (m - k + 1), made monotone, at most 1; order is kept."""
    expected = np.minimum(1, np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)))[np.argsort(np.argsort(p, kind="stable"))]
    np.testing.assert_allclose(adjusted_holm(p), expected)


def test_benjamini_and_hochbergs_own_example() -> None:
    """The 15 p values of their paper: four are shown at 5 %, where Holm shows three."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    assert sum(q <= 0.05 for q in adjusted_bh(p)) == 4 and sum(q <= 0.05 for q in adjusted_holm(p)) == 3
    assert adjusted_bh([]) == adjusted_holm([]) == adjusted_max_t([]) == []


@settings(deadline=None, max_examples=25)
@given(
    effects=st.lists(st.sampled_from([0.0, 0.05, 0.15, 0.3, -0.3, 2.0]), min_size=1, max_size=6),
    seeds=st.sampled_from([1, 2, 5, 6, 9]),
    seed=st.integers(0, 1000),
    correct=st.sampled_from([holm, max_t, benjamini_hochberg]),
)
def test_interval_p_and_words_agree_after_any_correction(effects: list[float], seeds: int, seed: int, correct) -> None:
    before = family(effects, 10, seeds, seed)
    after = correct(before)
    assert all(map(agrees, after)) and [one.a for one in after] == [one.a for one in before]
    assert {one.family for one in after} == {len(effects)}
    assert all(one.estimate.level >= 0.95 - 1e-12 and one.difference == old.difference for one, old in zip(after, before, strict=True))


def test_max_t_of_one_contrast_corrects_nothing_and_of_the_same_one_twice_neither() -> None:
    (one,) = max_t(family([0.2], 36, 8))
    assert one.p_adjusted == pytest.approx(one.p, abs=0.01) and one.correction == "max-T"
    single = family([0.08], 36, 40)[0]
    twice = max_t([single, replace(single, a="again")])
    assert 0.001 < single.p < 0.5 and all(single.p <= one.p_adjusted < 1.8 * single.p for one in twice)


def test_max_t_is_between_p_and_holm_and_gains_from_correlation() -> None:
    contrasts = family([0.12] * 6, 36, 12, shared=0.9)
    by_max_t, by_holm = max_t(contrasts), holm(contrasts)
    assert all(one.p <= one.p_adjusted <= other.p_adjusted + 1e-12 for one, other in zip(by_max_t, by_holm, strict=True))
    assert max(one.p_adjusted for one in by_max_t) < max(one.p_adjusted for one in by_holm)


def test_max_t_of_independent_tests_is_sidaks() -> None:
    """Many seeds, nothing shared: the smallest p becomes 1 - (1 - p)^m."""
    contrasts = family([0.03] * 4, 60, 400, seed=3)
    smallest = min(contrasts, key=lambda one: one.p)
    (corrected,) = (one for one in max_t(contrasts) if one.a == smallest.a)
    assert corrected.p_adjusted == pytest.approx(1 - (1 - smallest.p) ** 4, abs=0.03)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_max_t_keeps_the_family_wise_error(shared: float) -> None:
    """250 families of five true nulls, 36 items and 6 seeds: one is shown in 5 % of the families, give or take 3 %."""
    generator = np.random.default_rng(5)

    def noise() -> np.ndarray:
        return 0.3 * generator.normal(size=(36, 1)) + 0.1 * generator.normal(size=(1, 6)) + 0.14 * generator.normal(size=(36, 6))

    shown = 0
    for i in range(250):
        base = shared**0.5 * noise()
        tables = [(1 - shared) ** 0.5 * noise() - base for _ in range(5)]
        shown += min(adjusted_max_t([(table, crossed(table)) for table in tables], draws=499, seed=i)) <= 0.05
    assert 0.005 <= shown / 250 <= 0.08


def test_max_t_falls_back_to_holm() -> None:
    assert {one.correction for one in max_t(family([0.1, 0.2], 20, 5))} == {"Holm"}, "five seeds"
    constant = contrast("m", "a", "b", np.full((20, 6), 0.5), np.zeros((20, 6)))
    assert {one.correction for one in max_t([constant, *family([0.1], 20, 6)])} == {"Holm"}, "no standard error"


def test_metrics_with_other_items_share_a_family() -> None:
    other = [contrast("loss", "arm 0", "base", normal(9, 7, seed=1) + 5, np.zeros((9, 7)))]
    corrected = max_t([*family([0.0, 0.1], 36, 7), *other])
    assert corrected[2].shown and all(map(agrees, corrected))


# ---- a question


def test_a_question_corrects_each_role_by_itself() -> None:
    primary, *rest = family([0.2, 0.2, 0.0, 0.1, 0.0, 0.3], 36, 8)
    found = answer(primary, rest[:2], rest[2:])
    assert found.primary.p_adjusted == found.primary.p == primary.p and found.primary.role == "primary"
    assert [one.correction for one in found.secondary] == ["max-T"] * 2 and {one.family for one in found.secondary} == {2}
    assert {(one.role, one.correction, one.family) for one in found.exploratory} == {("exploratory", "Benjamini-Hochberg", 3)}
    assert all("exploratory" in one.verdict for one in found.exploratory)
    assert [one.a for one in found.contrasts] == [f"arm {i}" for i in range(6)] and all(map(agrees, found.contrasts))
    alone = answer(primary)
    assert alone.primary.estimate == found.primary.estimate, "others take nothing from the primary contrast"


def test_the_false_discovery_rate_of_exploratory_contrasts() -> None:
    """150 questions of ten contrasts, five of them true: of those shown at 5 % at most 5 %, give or take, are false."""
    shares = []
    for i in range(150):
        shown = [int(one.a.split()[1]) for one in benjamini_hochberg(family([0.0] * 5 + [0.4] * 5, 16, 6, seed=i)) if one.shown]
        shares.append(np.mean([arm < 5 for arm in shown]) if shown else 0.0)
    assert np.mean(shares) <= 0.05


def test_one_contrast_cannot_have_two_roles() -> None:
    primary, other = family([0.1, 0.2], 10, 6)
    turned = replace(primary, a="base", b="arm 0")
    for secondary, exploratory in (([primary], []), ([], [turned]), ([other], [other])):
        with pytest.raises(ConfigError, match="more than one role"):
            answer(primary, secondary, exploratory)


def test_a_family_over_different_seeds_or_alphas_is_refused() -> None:
    with pytest.raises(ConfigError, match="differ in their seeds") as error:
        max_t([*family([0.1], 10, 6), *family([0.1], 10, 7)])
    assert error.value.found == [6, 7]
    with pytest.raises(ConfigError, match="differ in their alphas"):
        holm([contrast("m", "a", "b", normal(9), normal(9, seed=1), alpha=alpha) for alpha in (0.05, 0.01)])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="too few gap of a"):
        contrast("gap", "a", "b", [1.0], [2.0])
    with pytest.raises(ConfigError, match="cannot be paired"):
        contrast("gap", "a", "b", [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(NonFiniteError, match="gap of b") as error:
        contrast("gap", "a", "b", [1.0, 2.0], [1.0, math.nan])
    assert error.value.found == "nan at item 1"
    with pytest.raises(ConfigError, match="alpha is no share"):
        contrast("gap", "a", "b", [1.0, 2.0], [1.0, 2.0], alpha=5)


@pytest.mark.parametrize("seed", range(20))
def test_where_the_corrected_p_is_alpha_itself_the_interval_says_shown_too(seed: int) -> None:
    single = contrast("gap", "a", "b", normal(12, 6, seed=seed) + 0.3, np.zeros((12, 6)))
    at_alpha = _corrected(single, single.alpha, "secondary", "max-T", 4) if single.p < single.alpha else single
    assert at_alpha.shown is not (at_alpha.estimate.low <= 0 <= at_alpha.estimate.high)
