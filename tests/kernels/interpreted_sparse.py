"""The Triton kernels of sparse features in Triton's interpreter against float64, as interpreted.py does it for the others."""

from __future__ import annotations

import importlib

import pytest
import torch
from interpreter_memory import OUT, SMALL, random
from kernel_formulas import best_features, decoded, error, surrounded
from torch import Tensor

from steer.kernels import force, sparse_decode, topk_encode
from steer.kernels.sparse_decode import decode_pattern
from steer.kernels.sparse_pattern import SparsePattern

decode_file, topk_file = (importlib.import_module(f"steer.kernels.{name}") for name in ("sparse_decode", "topk_encode"))
pytest_plugins = ["interpreter_memory"]  # fixtures
FORWARD, BACKWARD = ["sparse_decode.gather_sum"], ["sparse_decode.entries", "sparse_decode.gather_sum"]


def indices_of(*shape: int, features: int, seed: int = 5) -> Tensor:
    return torch.randint(features, shape, generator=torch.Generator().manual_seed(seed))


# ---- sparse_decode


@pytest.mark.parametrize(("features", "width", "k"), [(1, 1, 1), (3, 33, 5), (7, 100, 19), (9, 16, 1)])
def test_sparse_decode(features: int, width: int, k: int, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that are on at many tokens, at none, and twice at one; with more entries and columns than a step takes."""
    monkeypatch.setattr(decode_file, "TILE_NUMBERS", 128)
    monkeypatch.setattr(decode_file, "MAX_BLOCK_SIZE", 32)
    values, weight, indices = random(2, 3, k), random(features, width, seed=1), indices_of(2, 3, k, features=features)
    single = [values.clone().requires_grad_(), surrounded(weight).requires_grad_()]
    double = [values.double().requires_grad_(), weight.double().requires_grad_()]
    result, expected = sparse_decode(single[0], indices, single[1]), decoded(double[0], indices, double[1])
    pull = random(2, 3, width, seed=2)
    slopes, expected_slopes = torch.autograd.grad(result, single, surrounded(pull)), torch.autograd.grad(expected, double, pull.double())
    assert error(result, expected) <= OUT and all(error(a, b) <= SMALL for a, b in zip(slopes, expected_slopes, strict=True))
    assert launched == FORWARD + BACKWARD


def test_sparse_decode_of_a_pattern_with_tokens_of_different_numbers_of_features(launched: list[str]) -> None:
    token, feature = torch.tensor([1, 1, 1, 3, 4]), torch.tensor([2, 0, 2, 5, 2])
    values, weight = random(5).requires_grad_(), random(6, 20, seed=1).requires_grad_()
    out = decode_pattern(values, weight, SparsePattern(token, feature, 6, 6))
    dense = torch.zeros(6, 6, dtype=torch.float64).index_put((token, feature), values.double(), accumulate=True) @ weight.double()
    pull = random(6, 20, seed=2)
    assert error(out, dense) <= OUT and torch.equal(out[[0, 2, 5]], torch.zeros(3, 20))
    for a, b in zip(*(torch.autograd.grad(result, (values, weight), pull.to(result.dtype)) for result in (out, dense)), strict=True):
        assert error(a, b) <= SMALL
    assert launched == FORWARD + BACKWARD


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
def test_sparse_decode_of_nothing(shape: tuple[int, ...]) -> None:
    values, weight = torch.zeros(shape).requires_grad_(), random(5, 8).requires_grad_()
    out = sparse_decode(values, torch.zeros(shape, dtype=torch.long), weight)
    assert torch.equal(out, torch.zeros(*shape[:-1], 8))
    out.sum().backward()
    assert values.grad.shape == shape and torch.equal(weight.grad, torch.zeros(5, 8))


def test_sparse_decode_of_columns_that_lie_apart_and_of_half_precision() -> None:
    values, indices, weight = random(4, 3).T.contiguous().T, indices_of(3, 4, features=6).T, random(20, 6, seed=1).T
    assert weight.stride(-1) == 6 and not values.is_contiguous() and not indices.is_contiguous()
    assert error(sparse_decode(values, indices, weight), decoded(values.double(), indices, weight.double())) <= OUT
    half = weight.half()
    out = sparse_decode(values.half(), indices, half)
    assert out.dtype is torch.float32 and error(out, decoded(values.half().double(), indices, half.double())) <= OUT


def test_an_index_in_no_row_reads_nothing_where_nobody_can_look(launched: list[str]) -> None:
    values, weight = random(2, 3).requires_grad_(), random(4, 10, seed=1).requires_grad_()
    indices = torch.tensor([[0, -1, 3], [4, 1 << 40, 2]])
    inside = values.detach() * torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for path in ("triton", "aten"):
        with force(path):
            out = torch.ops.steer.sparse_decode(values, indices, weight)
            slopes = torch.autograd.grad(out.sum(), (values, weight))
        assert error(out, decoded(inside.double(), indices.clamp(0, 3), weight.double())) <= OUT
        assert slopes[0][0, 1] == slopes[0][1, 0] == slopes[0][1, 1] == 0 and torch.equal(slopes[1][1], torch.zeros(10))
    assert launched[:3] == FORWARD + BACKWARD


def test_sparse_decode_gives_the_same_bits_twice() -> None:
    values, weight, indices = random(6, 5).requires_grad_(), random(4, 24, seed=1).requires_grad_(), indices_of(6, 5, features=4)
    runs = [torch.autograd.grad(sparse_decode(values, indices, weight).square().sum(), (values, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- topk_encode

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("features", "tile", "k"), [(1, 8, 1), (50, 16, 19), (37, 64, 9), (33, 16, 33)])
def test_topk_encode(features: int, tile: int, k: int, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_file, "TILE_SIZE", tile)
    tensors = {"x": random(2, 1, 6), "weight": random(features, 6, seed=1), "bias": random(features, seed=2)}
    single = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    double = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    values, indices = topk_encode(**single, k=k)
    pre = double["x"] @ double["weight"].T + double["bias"]
    best = best_features(pre.detach(), k)
    expected = pre.gather(-1, best)
    assert torch.equal(indices, best) and error(values, expected) <= OUT
    pull = random(2, 1, k, seed=3)
    slopes = torch.autograd.grad(values, list(single.values()), pull)
    expected_slopes = torch.autograd.grad(expected, list(double.values()), pull.double())
    assert all(error(a, b) <= SMALL for a, b in zip(slopes, expected_slopes, strict=True))
    tiles = -(-features // min(tile, features))
    assert launched == ["topk_encode.merge"] * tiles + ["sparse_decode.gather_sum"] * 3


@pytest.mark.parametrize("tile", [16, 64])
def test_of_equal_ones_the_first_are_taken(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers from -2 to 2, as whole as they are after the product; 0 and -0 are equal."""
    monkeypatch.setattr(topk_file, "TILE_SIZE", tile)
    numbers = torch.randint(-2, 3, (4, 40), generator=torch.Generator().manual_seed(3)).float()
    numbers[numbers == 0] = torch.where(torch.arange(int((numbers == 0).sum())) % 2 == 0, 0.0, -0.0)
    numbers[3] = 1.0
    for k in (7, 40):
        values, indices = topk_encode(torch.eye(4), numbers.T.contiguous(), None, k)
        assert torch.equal(indices, best_features(numbers, k)) and torch.equal(values, numbers.gather(1, indices))


@pytest.mark.parametrize("tile", [4, 64])
def test_numbers_that_are_not_finite(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nan is larger than everything, whatever its sign."""
    monkeypatch.setattr(topk_file, "TILE_SIZE", tile)
    bias = torch.tensor([1.0, -INF, INF, NAN, 2.0, -NAN, INF, -1.0, NAN, 3.0])
    for k in (1, 4, 6, 10):
        values, indices = topk_encode(torch.zeros(1, 3), torch.zeros(10, 3), bias, k)
        assert torch.equal(indices, best_features(bias[None], k))
        assert torch.equal(values, bias[indices]) or torch.equal(values.nan_to_num(77), bias[indices].nan_to_num(77))
    values, indices = topk_encode(torch.full((1, 3), NAN), random(10, 3), None, 4)
    assert bool(values.isnan().all()) and indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_topk_encode_of_nothing(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape).requires_grad_(), random(5, 6).requires_grad_()
    values, indices = topk_encode(x, weight, None, 2)
    values.sum().backward()
    assert values.shape == indices.shape == (*shape[:-1], 2) and torch.equal(weight.grad, torch.zeros(5, 6)) and x.grad.shape == shape


def test_topk_encode_of_columns_that_lie_apart_in_parts(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """More tokens than are taken at a time, as rows of a transposed matrix."""
    monkeypatch.setattr(topk_file, "TILE_SIZE", 16)
    monkeypatch.setattr(topk_file, "MAX_NUMEL", 32)
    x, weight, bias = random(6, 3).T, random(6, 20, seed=1).T, random(40, seed=2)[::2]
    values, indices = topk_encode(x, weight, bias, 4)
    pre = x.double() @ weight.double().T + bias.double()
    assert torch.equal(indices, best_features(pre, 4)) and error(values, pre.gather(1, indices)) <= OUT
    assert launched == ["topk_encode.merge"] * 3 * 2


def test_more_features_than_registers_hold_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(topk_file, "MAX_K", 3)
    x, weight = random(2, 6), random(20, 6, seed=1)
    assert torch.equal(topk_encode(x, weight, None, 4).indices, best_features(x.double() @ weight.double().T, 4)) and not launched


def test_the_operator_of_topk_encode_runs_the_kernels(launched: list[str]) -> None:
    tensors = [random(3, 6).requires_grad_(), random(20, 6, seed=1).requires_grad_(), random(20, seed=2).requires_grad_()]
    results = []
    for path in ("op", "aten"):
        with force(path):
            values, indices = topk_encode(*tensors, 4)
            results.append((values, indices, *torch.autograd.grad(values.square().sum(), tensors)))
    assert torch.equal(results[0][1], results[1][1]) and all(error(a, b) <= SMALL for a, b in zip(*results, strict=True))
    assert launched == ["topk_encode.merge"] + ["sparse_decode.gather_sum"] * 3
