"""Effect against damage: who is undominated, how surely, and two methods at equal damage."""

from __future__ import annotations

import numpy as np
import pytest

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.pareto import at_equal_damage, pareto


def around(mean: float, seed: int, items: int = 40, seeds: int = 4, sd: float = 0.1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return mean + sd * (generator.normal(size=(items, 1)) + 0.2 * generator.normal(size=(1, seeds)) + generator.normal(size=(items, seeds)))


def curve(slope: float, seed: int = 0, sd: float = 0.1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three strengths whose effect is slope times their damage, measured on 40 items and 30 others."""
    return [
        (around(slope * x, 10 * i + seed, sd=sd), around(x, 10 * i + seed + 5, items=30, sd=sd / 10)) for i, x in enumerate((0.5, 1.0, 1.5))
    ]


def test_the_undominated_arms() -> None:
    effects = {"weak": 0.2, "strong": 0.8, "bad": 0.1, "same": 0.2, "twin": 0.8}
    damages = {"weak": 0.1, "strong": 0.5, "bad": 0.3, "same": 0.1, "twin": 0.6}
    arms = pareto(*({arm: np.full((6, 2), value) for arm, value in of.items()} for of in (effects, damages)))
    assert [arm.arm for arm in arms if arm.undominated] == ["weak", "strong", "same"], "equals do not dominate each other"
    assert [arm.effect for arm in arms] == pytest.approx(list(effects.values()))
    assert [arm.damage for arm in arms] == pytest.approx(list(damages.values()))
    assert [arm.membership for arm in arms] == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_membership_says_how_sure_it_is() -> None:
    """Two arms of the same damage: the one with more effect is sure of its place, one as good as another has it in half of the samples."""
    damage = np.zeros((40, 4))
    clear = pareto({"a": around(1.0, 0), "b": around(0.0, 1)}, {"a": damage, "b": damage})
    assert [arm.membership for arm in clear] == [1.0, 0.0]
    base = around(0.0, 2)
    other = around(0.0, 3)
    other += base.mean() - other.mean()
    close = pareto({"a": base, "b": other}, {"a": damage, "b": damage}, resamples=4000)
    assert sum(arm.membership for arm in close) == pytest.approx(1.0) and close[0].membership == pytest.approx(0.5, abs=0.1)


def test_seeds_are_resampled_too() -> None:
    """One seed of three turns the order over: 36 items that agree do not make it sure."""
    flip = np.tile([0.5, 0.5, -0.9], (36, 1))
    sure = pareto({"a": flip, "b": np.zeros((36, 3))}, {"a": flip * 0, "b": flip * 0})[0].membership
    assert sure == pytest.approx(1 - 7 / 27, abs=0.04), "of 27 draws of three seeds 7 hold the odd one twice or thrice"


def test_the_same_seed_gives_the_same_membership() -> None:
    effects, damages = {"a": around(0.1, 0), "b": around(0.1, 1)}, {"a": around(0.1, 2), "b": around(0.12, 3)}
    assert pareto(effects, damages) == pareto(effects, damages) != pareto(effects, damages, seed=1)


def test_methods_are_compared_at_equal_damage_not_at_equal_strength() -> None:
    """Twice the effect at each damage, though their strengths lie elsewhere."""
    runs = {"vector": curve(2.0), "prompt": curve(1.0)[:2]}
    found = at_equal_damage("vector", "prompt", runs, damage=0.75)
    assert (found.effect_a, found.effect_b) == pytest.approx((1.5, 0.75), abs=0.15)
    assert found.shown and found.low < found.difference < found.high and found.difference == found.effect_a - found.effect_b
    turned = at_equal_damage("prompt", "vector", {"prompt": runs["vector"], "vector": runs["prompt"]}, damage=0.75)
    assert turned.difference == found.difference
    same = at_equal_damage("vector", "other", {"vector": curve(1.0), "other": curve(1.0, seed=3)})
    assert not same.shown and same.damage == pytest.approx(0.75, abs=0.05) and same.beyond == 0.0
    assert same.seeds == 4


def test_the_curve_never_falls_and_starts_at_the_unedited_model() -> None:
    """An effect that falls at the highest strength is averaged with the one before (isotonic regression)."""
    falling = [(np.full((5, 2), effect), np.full((5, 2), damage)) for effect, damage in ((1.0, 1.0), (3.0, 2.0), (2.0, 3.0))]
    nothing = [(np.zeros((5, 2)), np.full((5, 2), 3.0))]
    effects = [at_equal_damage("a", "b", {"a": falling, "b": nothing}, damage=x).difference for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)]
    assert effects == pytest.approx([0.0, 0.5, 1.0, 1.75, 2.5, 2.5])


def test_coverage_at_equal_damage() -> None:
    """150 experiments, true difference 0.75: 95 % give or take 4."""
    covered = 0
    for i in range(150):
        runs = {"a": curve(2.0, seed=1000 * i), "b": curve(1.0, seed=1000 * i + 500)}
        found = at_equal_damage("a", "b", runs, damage=0.75, resamples=200)
        covered += found.low <= 0.75 <= found.high
    assert 0.91 <= covered / 150 <= 0.99


def test_damage_that_resamples_do_not_reach_is_counted() -> None:
    runs = {"a": curve(2.0, sd=3.0), "b": curve(1.0, seed=1, sd=3.0)}
    reached = min(max(d.mean() for _, d in run) for run in runs.values())
    assert 0.2 < at_equal_damage("a", "b", runs, damage=reached).beyond < 1


def test_bad_input() -> None:
    good = {"a": around(0, 0), "b": around(0, 1)}
    with pytest.raises(ConfigError, match="same arms"):
        pareto(good, {"a": good["a"]})
    with pytest.raises(ConfigError, match="same arms"):
        pareto({}, {})
    with pytest.raises(ConfigError, match="effect of the arms is not paired"):
        pareto({"a": good["a"], "b": good["b"][:9]}, good)
    with pytest.raises(ConfigError, match="differ in their seeds"):
        pareto(good, {arm: table[:, :3] for arm, table in good.items()})
    with pytest.raises(NonFiniteError, match="damage of b"):
        pareto(good, {"a": good["a"], "b": good["b"] * np.nan})
    with pytest.raises(ConfigError, match="no strengths of method 'c'"):
        at_equal_damage("a", "c", {"a": curve(1.0)})
    with pytest.raises(ConfigError, match="compared with itself"):
        at_equal_damage("a", "a", {"a": curve(1.0)})
    for damage in ("0.5", float("nan")):
        with pytest.raises(ConfigError, match="the damage at which"):
            at_equal_damage("a", "b", {"a": curve(1.0), "b": curve(2.0)}, damage=damage)  # type: ignore[arg-type]
    for resamples in (0, 1.5):
        with pytest.raises(ConfigError, match="resamples"):
            pareto(good, good, resamples=resamples)  # type: ignore[arg-type]
    for damage in (9.0, -0.1):
        with pytest.raises(ConfigError, match="cannot be compared") as error:
            at_equal_damage("a", "b", {"a": curve(1.0), "b": curve(2.0)}, damage=damage)
        assert set(error.value.found) == {"a", "b"}
