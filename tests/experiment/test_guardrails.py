"""A guardrail is kept only when the harm is shown to be within the margin."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.guardrails import guardrail


def table(mean: float, sd: float = 0.02, items: int = 30, seeds: int = 5, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return mean + sd * (generator.normal(size=(items, 1)) + 0.3 * generator.normal(size=(1, seeds)) + generator.normal(size=(items, seeds)))


@pytest.mark.parametrize(
    ("harm", "sd", "outcome"),
    [
        pytest.param(0.0, 0.02, "kept", id="no harm, well measured"),
        pytest.param(0.0, 0.5, "not shown to be kept", id="no difference shown is not no damage"),
        pytest.param(0.1, 0.02, "exceeded", id="harm beyond the margin"),
        pytest.param(0.02, 0.02, "not shown to be kept", id="harm about as large as the margin"),
    ],
)
@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("seeds", [1, 5])
def test_three_outcomes(harm: float, sd: float, outcome: str, better: str, seeds: int) -> None:
    sign = 1 if better == "lower" else -1
    found = guardrail("loss", "warm", "plain", sign * table(harm, sd, seeds=seeds), np.zeros((30, seeds)), margin=0.02, better=better)
    assert found.outcome == outcome and outcome in found.verdict
    assert found.harm.mean == pytest.approx(harm, abs=sd)
    assert (found.harm.high < 0.02, found.harm.low > 0.02) == (outcome == "kept", outcome == "exceeded")


def test_one_seed_is_the_one_sided_students_test_where_many_items_make_them_alike() -> None:
    x = np.random.default_rng(0).normal(size=400)
    found = guardrail("loss", "a", "b", x, np.zeros(400), margin=0.1, better="lower")
    assert found.p == pytest.approx(stats.ttest_1samp(x, 0.1, alternative="less").pvalue, abs=0.01)
    assert found.harm.high == pytest.approx(stats.ttest_1samp(x, 0, alternative="less").confidence_interval(0.95).high, abs=0.005)


def test_an_arm_at_the_margin_passes_in_one_of_twenty() -> None:
    passed = [
        guardrail("loss", "a", "b", table(0.02, seed=i), np.zeros((30, 5)), margin=0.02, better="lower").outcome == "kept"
        for i in range(600)
    ]
    assert 0.025 <= np.mean(passed) <= 0.075


@settings(deadline=None, max_examples=40)
@given(harm=st.sampled_from([-0.1, 0.0, 0.01, 0.02, 0.05]), seeds=st.sampled_from([1, 3]), items=st.integers(2, 9), seed=st.integers(0, 99))
def test_bounds_p_and_outcome_agree(harm: float, seeds: int, items: int, seed: int) -> None:
    found = guardrail(
        "m", "a", "b", table(harm, items=items, seeds=seeds, seed=seed), np.zeros((items, seeds)), margin=0.02, better="lower"
    )
    assert (found.outcome == "kept") == (found.harm.high < 0.02) == (found.p <= 0.05)
    assert (found.outcome == "exceeded") == (found.harm.low > 0.02)


def test_words_and_json() -> None:
    found = guardrail("loss", "warm", "plain", table(0.1), np.zeros((30, 5)), margin=0.02, better="lower", unit="nat/token")
    assert found.verdict.startswith("loss: margin exceeded by warm (worse than plain by +0.10 nat/token, at least +0.0")
    assert found.verdict.endswith("one-sided 95 %; margin +0.02)")
    few = guardrail("loss", "warm", "plain", [0.0, 0.1], [0.0, 0.0], margin=0, better="lower")
    assert "without a bound" in few.verdict and few.to_dict()["bounds"] == [None, None] and json.dumps(few.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": None}, "guardrail 'loss' has no margin"),
        ({"margin": -0.02}, "wrong margin of guardrail 'loss'"),
        ({"margin": math.nan}, "wrong margin"),
        ({"margin": "1 %"}, "wrong margin"),
        ({"better": "low"}, "does not know what is worse"),
        ({"alpha": 0.5}, "too large for a one-sided bound"),
    ],
)
def test_bad_guardrails(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        guardrail("loss", "a", "b", [1.0, 2.0], [1.0, 2.0], **({"margin": 0.1, "better": "lower"} | changes))
    assert error.value.remedy and error.value.expected
    with pytest.raises(NonFiniteError, match="loss of a"):
        guardrail("loss", "a", "b", [1.0, math.inf], [1.0, 2.0], margin=0.1, better="lower")
