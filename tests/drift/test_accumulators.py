"""Streaming moments: the same numbers in any order, in any pieces, on any number of ranks, from any dtype."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.drift.accumulators import ProjectionMoments, accumulation_dtype
from steer.errors import WidthError

K = 3


def tokens(n: int, seed: int = 0, centre: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, K, generator=generator, dtype=torch.float64) + centre, torch.rand(n, generator=generator) < 0.6


def of(pieces: list[tuple[Tensor, Tensor]]) -> ProjectionMoments:
    moments = ProjectionMoments(K)
    for p, w in pieces:
        moments.update(p, w)
    return moments


def check(moments: ProjectionMoments, p: Tensor, w: Tensor, rtol: float = 1e-12) -> None:
    counted = p[w].double()
    assert int(moments.n) == len(counted)
    torch.testing.assert_close(moments.mean, counted.mean(0) if len(counted) else torch.zeros(K).double(), rtol=rtol, atol=1e-12)
    if len(counted) > 1:
        torch.testing.assert_close(moments.variance, counted.var(0), rtol=rtol, atol=1e-12)
        torch.testing.assert_close(moments.sd, counted.std(0), rtol=rtol, atol=1e-12)
    else:
        assert bool(moments.variance.isnan().all())


sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes=sizes, seed=st.integers(0, 1000), centre=st.sampled_from([0.0, -3.0, 1e4]))
def test_pieces_equal_the_whole_in_any_order(sizes: list[int], seed: int, centre: float) -> None:
    p, w = tokens(sum(sizes), seed, centre)
    pieces = list(zip(p.split(sizes), w.split(sizes), strict=True))
    check(of(pieces), p, w, rtol=1e-9)
    check(of(pieces[::-1]), p, w, rtol=1e-9)


@settings(deadline=None)
@given(sizes=sizes, seed=st.integers(0, 1000))
def test_merging_equals_one_accumulator(sizes: list[int], seed: int) -> None:
    p, w = tokens(sum(sizes), seed)
    merged = ProjectionMoments(K)
    for piece in zip(p.split(sizes), w.split(sizes), strict=True):
        merged.merge(of([piece]))
    check(merged, p, w, rtol=1e-10)


def reduce_all(ranks: list[ProjectionMoments]) -> list[ProjectionMoments]:
    """`reduced` on every rank at once, one thread a rank, with a sum that waits for all of them."""
    barrier, slots = threading.Barrier(len(ranks)), [torch.empty(0)] * len(ranks)

    def run(rank: int) -> ProjectionMoments:
        def reduce(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return ranks[rank].reduced(reduce)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, range(len(ranks))))


@pytest.mark.parametrize("split", [(10, 30), (39, 1), (0, 40), (13, 13, 14)])
def test_ranks_with_unequal_shares_equal_one_rank(split: tuple[int, ...]) -> None:
    p, w = tokens(40, centre=2.0)
    ranks = [of([piece]) for piece in zip(p.split(split), w.split(split), strict=True)]
    before = [rank.state_dict() for rank in ranks]
    for reduced in reduce_all(ranks):
        check(reduced, p, w)
    for rank, state in zip(ranks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in rank.state_dict().items())  # a reduction changes nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_projections_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    """2^18 tokens around 64 with a spread of 1: bf16 sums would stick at a mean of 64 and a variance of 0."""
    p = (tokens(2**18)[0] + 64).to(dtype)
    w = torch.ones(len(p), dtype=torch.bool)
    check(of(list(zip(p.split(4096), w.split(4096), strict=True))), p, w, rtol=1e-9)


def test_single_precision_is_enough_where_there_is_no_double() -> None:
    assert accumulation_dtype("mps") is torch.float32 and accumulation_dtype("cpu") is torch.float64
    p = tokens(2**16)[0] + 300
    moments = ProjectionMoments(K)
    moments.n, moments.mean, moments.m2 = moments.n.float(), moments.mean.float(), moments.m2.float()
    for piece in p.float().split(1024):
        moments.update(piece, torch.ones(len(piece)))
    torch.testing.assert_close(moments.mean.double(), p.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance.double(), p.var(0), rtol=1e-4, atol=0)
    naive = (p.float().square().sum(0) - p.float().sum(0).square() / len(p)) / (len(p) - 1)
    assert float((naive.double() / p.var(0) - 1).abs().max()) > 1e-4  # what plain sums would have given


def test_masked_tokens_do_not_count_whatever_they_hold() -> None:
    p, w = tokens(50)
    poisoned = p.clone()
    poisoned[~w] = torch.tensor([float("nan"), float("inf"), -float("inf")]).double()
    check(of([(poisoned, w)]), p, w)
    assert of([(poisoned, torch.ones(50))]).mean.isnan().any()  # and those that count are not hidden


def test_counts_weigh_like_repeated_tokens() -> None:
    p, _ = tokens(20)
    counts = torch.arange(20) % 4
    twice = p.repeat_interleave(counts, dim=0)
    check(of([(p, counts)]), twice, torch.ones(len(twice), dtype=torch.bool))


def test_state_goes_round_and_is_a_copy() -> None:
    moments = of([tokens(30)])
    state = moments.state_dict()
    restored = ProjectionMoments(K)
    restored.load_state_dict(state)
    for m in (moments, restored):
        m.update(*tokens(10, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(moments.state_dict().values(), restored.state_dict().values(), strict=True))
    assert int(state["n"]) != int(moments.n)
    moments.reset()
    check(moments, *(t[:0] for t in tokens(1)))
    with pytest.raises(WidthError, match="another accumulator"):
        ProjectionMoments(K + 1).load_state_dict(state)


def test_wrong_number_of_projections() -> None:
    with pytest.raises(WidthError, match="projections"):
        ProjectionMoments(K).update(torch.zeros(4, K + 1), torch.ones(4))


def test_made_in_inference_mode_and_used_in_training() -> None:
    with torch.inference_mode():
        moments = ProjectionMoments(K)
    moments.update(*tokens(5))
    assert not moments.mean.is_inference()


def test_update_never_waits_for_the_device() -> None:
    """On the meta device any read of a value raises."""
    moments = ProjectionMoments(K, "meta")
    moments.update(torch.zeros(7, K, device="meta"), torch.ones(7, device="meta"))
    moments.merge(ProjectionMoments(K, "meta"))
    assert moments.reduced(lambda x: x).sd.shape == (K,)


def test_update_compiles_without_a_graph_break() -> None:
    moments, reference = ProjectionMoments(K), of([tokens(16), tokens(24, seed=1)])
    update = torch.compile(lambda p, w: moments.update(p, w), backend="eager", fullgraph=True)
    update(*tokens(16))
    update(*tokens(24, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(moments.state_dict().values(), reference.state_dict().values(), strict=True))
