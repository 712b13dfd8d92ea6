"""Sparse decoding and top-k encoding where no kernel runs: the PyTorch forms against formulas by hand, the operators, what is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from kernel_formulas import best_features, decoded, error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steer.errors import ConfigError, WidthError
from steer.kernels import force, sparse_decode, topk_encode
from steer.kernels.sparse_pattern import SparsePattern

topk_file = importlib.import_module("steer.kernels.topk_encode")  # the function of the package hides it
FEATURES, K, WIDTH = 50, 6, 12


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALUES, X, WEIGHT, BIAS = (
    numbers(2, 3, K, seed=0),
    numbers(2, 3, WIDTH, seed=1),
    numbers(FEATURES, WIDTH, seed=2),
    numbers(FEATURES, seed=3),
)
INDICES = torch.randint(FEATURES // 5, (2, 3, K), generator=torch.Generator().manual_seed(4))  # some twice at a token
PATHS = ["auto", "aten", "op", "traced", "compiled"]


def run(path: str, function: Any, *arguments: Any) -> Any:
    if path == "traced":
        with FlopCounterMode(display=False):
            return function(*arguments)
    if path == "compiled":
        return torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
    with force(path):
        return function(*arguments)


@pytest.mark.parametrize("path", PATHS)
def test_sparse_decode(path: str) -> None:
    values, weight = VALUES.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    out, expected = run(path, sparse_decode, values, INDICES, weight), decoded(values, INDICES, weight)
    assert out.dtype is torch.float64 and error(out, expected) <= 1e-14
    pull = numbers(2, 3, WIDTH, seed=5)
    with force(path if path in ("aten", "op") else "auto"):
        slopes = torch.autograd.grad(out, (values, weight), pull)
    for slope, by_hand in zip(slopes, torch.autograd.grad(expected, (values, weight), pull), strict=True):
        assert error(slope, by_hand) <= 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_topk_encode(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_file, "TILE_SIZE", 16)
    tensors = [X.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()]
    pre = X @ WEIGHT.T + BIAS
    values, indices = run(path, topk_encode, *tensors, K)
    assert torch.equal(indices, best_features(pre, K)) and error(values, pre.gather(-1, indices)) <= 1e-14
    pull = numbers(2, 3, K, seed=5)
    with force(path if path in ("aten", "op") else "auto"):
        slopes = torch.autograd.grad(values, tensors, pull)
    by_hand = (tensors[0] @ tensors[1].T + tensors[2]).gather(-1, indices)
    for slope, expected in zip(slopes, torch.autograd.grad(by_hand, tensors, pull), strict=True):
        assert error(slope, expected) <= 1e-13


@pytest.mark.parametrize("path", ["auto", "aten", "compiled"])
@pytest.mark.parametrize("tile", [4, 64])
def test_equal_numbers_and_such_as_are_not_finite(path: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_file, "TILE_SIZE", tile)
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[1, 0, 0, 1, -0.0, 2, 1, 1, 0, 1], [nan, inf, -inf, 3, nan, inf, -1, 3, nan, 3], [5.0] * 10])
    for k in (1, 3, 5, 10):
        values, indices = run(path, topk_encode, torch.eye(3), torch.where(rows.isfinite(), rows, 0).T.contiguous(), None, k)
        assert torch.equal(indices[[0, 2]], best_features(rows, k)[[0, 2]])
        found, indices = run(path, topk_encode, torch.zeros(1, 3), torch.zeros(10, 3), rows[1], k)
        assert torch.equal(indices, best_features(rows[1:2], k)) and torch.equal(found.isnan(), rows[1][indices].isnan())
        assert values.dtype is torch.float32


def test_both_can_be_differentiated_twice() -> None:
    tensors = [tensor.clone().requires_grad_() for tensor in (VALUES[0], WEIGHT)]
    assert torch.autograd.gradcheck(lambda values, weight: sparse_decode(values, INDICES[0], weight), tensors)
    assert torch.autograd.gradgradcheck(lambda values, weight: sparse_decode(values, INDICES[0], weight), tensors)
    tensors = [tensor.clone().requires_grad_() for tensor in (X[0], WEIGHT, BIAS)]
    assert torch.autograd.gradcheck(lambda *tensors: topk_encode(*tensors, K).values, tensors)
    assert torch.autograd.gradgradcheck(lambda *tensors: topk_encode(*tensors, K).values, tensors)
    assert torch.autograd.gradgradcheck(lambda x: topk_encode(x, WEIGHT, None, K).values, tensors[:1])


def test_operators_are_as_torch_wants_them() -> None:
    values, weight, x = VALUES[0].clone().requires_grad_(), WEIGHT.clone().requires_grad_(), X[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.steer.sparse_decode, (values, INDICES[0], weight))
    torch.library.opcheck(torch.ops.steer.sparse_decode_backward, (X[0], VALUES[0], INDICES[0], WEIGHT, True, False))
    torch.library.opcheck(torch.ops.steer.topk_encode, (x, weight, BIAS.clone().requires_grad_(), K))


def test_a_pattern_of_a_dense_matrix_and_the_order_by_feature() -> None:
    f = numbers(4, 7, seed=6).relu() * (numbers(4, 7, seed=7) > 0)
    pattern, values = SparsePattern.of_dense(f)
    assert torch.equal(torch.zeros(4, 7, dtype=torch.float64).index_put((pattern.token, pattern.feature), values), f)
    order, starts = pattern.by_feature
    assert torch.equal(starts.diff(), (f != 0).sum(0)) and torch.equal(pattern.token_starts.diff(), (f != 0).sum(1))
    for feature in range(7):
        tokens = pattern.token[order[starts[feature] : starts[feature + 1]]]
        assert torch.equal(tokens, f[:, feature].nonzero()[:, 0])


def test_memory_of_topk_encode_does_not_grow_with_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made."""
    monkeypatch.setattr(topk_file, "TILE_SIZE", 64)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None and not function.is_view:
                sizes[-1] = max(sizes[-1], result.numel())
            return result

    monkeypatch.setattr(topk_file, "needs_pytorch_operations", lambda x: False)
    for features in (256, 4096):
        weight = torch.randn(features, 8)
        sizes.append(0)
        with torch.no_grad(), Largest():
            topk_encode(torch.randn(32, 8), weight, None, 4)
    assert sizes[0] == sizes[1] <= 32 * (64 + 4)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "an index below": (lambda: sparse_decode(VALUES[0], INDICES[0] - 50, WEIGHT), ConfigError, "outside the decoder[\\s\\S]*0 to 49"),
    "an index above": (lambda: sparse_decode(VALUES[0], INDICES[0] + 45, WEIGHT), ConfigError, "outside the decoder"),
    "indices of another shape": (lambda: sparse_decode(VALUES, INDICES[0], WEIGHT), ConfigError, "do not fit the values"),
    "indices that are no indices": (lambda: sparse_decode(VALUES, VALUES, WEIGHT), ConfigError, "whole numbers"),
    "a decoder of sites": (lambda: sparse_decode(VALUES, INDICES, WEIGHT[None]), WidthError, "features, width"),
    "a width": (lambda: topk_encode(X[..., 1:], WEIGHT, BIAS, K), WidthError, "features, 11"),
    "a bias": (lambda: topk_encode(X, WEIGHT, BIAS[1:], K), WidthError, "\\[49\\]"),
    "no k": (lambda: topk_encode(X, WEIGHT, BIAS, 0), ConfigError, "1 to 50"),
    "a large k": (lambda: topk_encode(X, WEIGHT, BIAS, 51), ConfigError, "1 to 50"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()
