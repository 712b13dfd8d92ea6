"""Rank among control draws, share of items that move the wrong way."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.specificity import rank_among_controls, wrong_way


@pytest.mark.parametrize(("wanted", "sign"), [("higher", 1), ("lower", -1)])
def test_the_rank_counts_controls_that_reach_the_treatment(wanted: str, sign: int) -> None:
    controls = [sign * x for x in (0.1, 0.5, -0.9, 0.4, 0.3)]
    second = rank_among_controls(sign * 0.45, controls, wanted=wanted)
    assert (second.rank, second.p, second.smallest_p) == (2, 2 / 6, 1 / 6) and second.effect == 0.45
    assert rank_among_controls(sign * 0.5, controls, wanted=wanted).rank == 2, "a control that does as much counts"
    assert rank_among_controls(-sign * 0.45, controls, wanted=wanted).rank == 5, "moved the wrong way: last but one"


def test_eight_draws_cannot_show_it_and_nineteen_can() -> None:
    eight, nineteen = (rank_among_controls(1.0, np.linspace(-0.5, 0.5, k), wanted="higher") for k in (8, 19))
    assert eight.p == eight.smallest_p == 1 / 9 and eight.verdict == (
        "not shown to be specific: rank 1 among 8 control draws, p=0.11; 8 draws cannot give less than 0.11"
    )
    assert nineteen.p == 0.05 and nineteen.verdict == "specific: rank 1 among 19 control draws, p=0.05"
    assert rank_among_controls(0.1, np.linspace(-0.5, 0.5, 19), wanted="higher").verdict.startswith("not shown to be specific: rank 9")


def test_a_treatment_like_its_controls_is_called_specific_in_one_of_twenty() -> None:
    effects = np.random.default_rng(0).normal(size=(4000, 20))
    p = np.array([rank_among_controls(row[0], row[1:], wanted="higher").p for row in effects])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.012)


def test_wilsons_interval() -> None:
    """(k + z²/2 ± z √(k(n-k)/n + z²/4)) / (n + z²) by hand, for 3 of 20 at 90 %."""
    found = wrong_way([-1.0] * 3 + [1.0] * 17, wanted="higher", level=0.9)
    z = NormalDist().inv_cdf(0.95)
    half = z * math.sqrt(3 * 17 / 20 + z**2 / 4)
    assert (found.low, found.high) == pytest.approx([(3 + z**2 / 2 + side * half) / (20 + z**2) for side in (-1, 1)])
    assert (found.share, found.wrong, found.items, found.level) == (0.15, 3, 20, 0.9)


def test_seeds_are_averaged_first_and_items_that_stay_are_no_wrong_way() -> None:
    table = [[0.1, 0.2, -0.3], [0.5, -0.1, 0.2], [-0.1, -0.2, 0.2], [0.0, 0.0, 0.0]]
    up, down = wrong_way(table, wanted="higher"), wrong_way(table, wanted="lower")
    assert (up.wrong, up.unchanged, up.share) == (1, 2, 0.25) and (down.wrong, down.unchanged) == (1, 2)
    nobody = wrong_way(np.ones(12), wanted="higher")
    assert (nobody.low, nobody.share) == (0.0, 0.0) and 0.2 < nobody.high < 0.3


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="needs controls"):
        rank_among_controls(1.0, [], wanted="higher")
    with pytest.raises(NonFiniteError, match="control draw 1"):
        rank_among_controls(1.0, [0.1, math.nan], wanted="higher")
    with pytest.raises(NonFiniteError, match="the treatment"):
        rank_among_controls(math.inf, [0.1], wanted="higher")
    with pytest.raises(ConfigError, match="control draw 0 is no number"):
        rank_among_controls(1.0, [None], wanted="higher")  # type: ignore[list-item]
    for call in (lambda: rank_among_controls(1.0, [0.1], wanted="up"), lambda: wrong_way([1.0, 2.0], wanted="")):
        with pytest.raises(ConfigError, match="aim is unknown"):
            call()
    with pytest.raises(ConfigError, match="too few"):
        wrong_way([1.0], wanted="higher")
