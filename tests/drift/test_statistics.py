"""The statistics against scipy, against simulation, and under the conditions they promise to survive."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from steer.drift.statistics import benjamini_hochberg, sign_flip_p, standardise
from steer.errors import ConfigError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 14])
def test_small_samples_are_enumerated(n: int) -> None:
    d = normal(n, 3) + 0.4
    every = torch.tensor(list(itertools.product([1.0, -1.0], repeat=n)), dtype=torch.float64)
    expected = ((every @ d).abs() >= d.sum(0).abs() - 1e-12).double().mean(0)
    torch.testing.assert_close(sign_flip_p(d), expected)
    if 2 <= n <= 9:
        scipy = stats.permutation_test(
            (d[:, 0].numpy(),), lambda a, axis: abs(a.mean(axis)), permutation_type="samples", alternative="greater", n_resamples=10**4
        )
        assert float(sign_flip_p(d)[0]) == pytest.approx(scipy.pvalue)


def test_large_samples_agree_with_the_normal_limit() -> None:
    d = normal(60, 4) + torch.tensor([0.0, 0.1, 0.2, 0.3])
    z = d.sum(0) / d.square().sum(0).sqrt()
    expected = torch.tensor(2 * stats.norm.sf(z.abs().numpy()))
    torch.testing.assert_close(sign_flip_p(d, draws=40000), expected, rtol=0, atol=0.015)


def test_p_is_seeded_never_zero_and_smallest_for_a_certain_shift() -> None:
    d = normal(40, 2) + 10
    assert sign_flip_p(d, draws=999).tolist() == [0.001, 0.001]
    weak = normal(40, 2) * 3 + 0.5
    assert torch.equal(sign_flip_p(weak, seed=1), sign_flip_p(weak, seed=1))
    assert not torch.equal(sign_flip_p(weak, seed=1), sign_flip_p(weak, seed=2))


def test_equal_sums_count_as_equal_despite_rounding() -> None:
    d = torch.tensor([[0.1], [0.2], [0.3], [-0.6]])  # observed sum 0 up to rounding: every pattern is at least as extreme
    assert sign_flip_p(d).item() == 1.0
    assert sign_flip_p(torch.full((5, 1), 0.1)).item() == 2 / 32


def test_degenerate_differences() -> None:
    assert sign_flip_p(torch.zeros(8, 1)).item() == 1.0
    assert sign_flip_p(torch.zeros(20, 1)).item() == 1.0
    for n in (8, 20):
        mixed = normal(n, 2)
        mixed[3, 0] = float("nan")
        p = sign_flip_p(mixed)
        assert math.isnan(p[0]) and 0 < float(p[1]) <= 1
    with pytest.raises(ConfigError, match="pairs"):
        sign_flip_p(torch.zeros(0, 1))


@pytest.mark.parametrize(("name", "n"), [("cauchy", 10), ("student3", 24), ("laplace", 10)])
def test_the_size_holds_under_heavy_tails(name: str, n: int) -> None:
    """2 000 tests of a true null at 5 %: between 3.5 % and 6.5 % reject (three standard errors)."""
    law = {"cauchy": stats.cauchy(), "student3": stats.t(3), "laplace": stats.laplace()}[name]
    d = torch.tensor(law.rvs(size=(n, 2000), random_state=7))
    rejected = float((sign_flip_p(d, draws=999) <= 0.05).double().mean())
    assert 0.035 <= rejected <= 0.065


def test_pairing_gives_the_power() -> None:
    """A shift of 0.2 between-prompt SD on 16 prompts: nearly certain when paired, hopeless when not."""
    prompts, noise = normal(16, 300), 0.1 * normal(16, 300, seed=1)
    paired = sign_flip_p(0.2 + noise, draws=999)
    unpaired = stats.ttest_ind((prompts + 0.2).numpy(), normal(16, 300, seed=2).numpy()).pvalue
    assert float((paired <= 0.05).double().mean()) > 0.99
    assert (unpaired <= 0.05).mean() < 0.25


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = torch.rand(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    torch.testing.assert_close(benjamini_hochberg(p), torch.tensor(stats.false_discovery_control(p.numpy())))
    assert benjamini_hochberg(torch.tensor([0.03])).item() == pytest.approx(0.03)
    q = benjamini_hochberg(torch.tensor([0.01, float("nan"), 0.04]))
    assert q[0].item() == pytest.approx(0.02) and q[1].isnan() and q[2].item() == pytest.approx(0.04)
    assert benjamini_hochberg(torch.tensor([])).shape == (0,)


def test_standardise_where_nothing_moves() -> None:
    sd = torch.tensor([2.0, 0.0, 0.0])
    assert standardise(torch.tensor([1.0, 0.0, 1.0]), sd).tolist() == [0.5, 0.0, math.inf]
