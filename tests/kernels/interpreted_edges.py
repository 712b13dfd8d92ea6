"""The Triton kernel of edge scores in Triton's interpreter against float64, as interpreted.py does it for the others."""

from __future__ import annotations

import importlib

import pytest
import torch
from interpreter_memory import OUT, SMALL, random
from kernel_formulas import error, scored, surrounded
from torch import Tensor

from steer.kernels import edge_scores, force

edge_file = importlib.import_module("steer.kernels.edge_scores")
pytest_plugins = ["interpreter_memory"]  # fixtures
CONTRACT = "edge_scores.contract"


def drawn(tokens: int, heads: int, d: int, readers: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(tokens, heads, d), random(width, heads * d, seed=1), random(tokens, readers, width, seed=2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 3, 4, 7, 33), (6, 9, 2, 15, 64), (3, 17, 3, 21, 40)])
@pytest.mark.parametrize("most", [10**6, 1])
def test_edge_scores(shape: tuple[int, ...], most: int, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch or token by token, with few programs that take several tiles, and with more heads and readers than one holds."""
    monkeypatch.setattr(edge_file, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(edge_file, "MAX_WRITERS", 16)
    monkeypatch.setattr(edge_file, "MAX_READERS", 16)
    dz, w_o, r = drawn(*shape)
    scores = edge_scores(dz, w_o, surrounded(r), max_bytes=most)
    assert scores.dtype is torch.float32 and error(scores, scored(dz, w_o, r)) <= SMALL
    assert launched == [CONTRACT] * (1 if most > 1 else shape[0])


def test_rows_of_a_batch_that_lie_apart_and_a_transposed_projection(launched: list[str]) -> None:
    """As differences of a batch, gradients with the readers first, and the weight of a Conv1D are."""
    dz, w_o, r = random(2, 3, 4, 6), random(24, 20, seed=1).T, random(5, 2, 3, 20, seed=2).movedim(0, 2)
    assert error(edge_scores(dz, w_o, r), scored(dz, w_o, r)) <= SMALL
    columns_apart = r.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert columns_apart.stride(-1) != 1 and error(edge_scores(dz, w_o, columns_apart), scored(dz, w_o, r)) <= SMALL
    assert launched == [CONTRACT] * 2


def test_writers_without_a_projection_and_half_precision() -> None:
    """Half precision is widened before it is added up; an fp32 output of a head meets fp16 gradients in two products."""
    u, r = random(4, 2, 40), random(4, 3, 40, seed=1)
    assert error(edge_scores(surrounded(u), None, r), scored(u, None, r)) <= OUT
    u16, r16 = u.half(), r.half()
    assert error(edge_scores(u16, None, r16), scored(u16, None, r16)) <= OUT
    dz, w_o = random(4, 2, 8).half(), random(40, 16, seed=3).half()
    assert error(edge_scores(dz, w_o, r16), scored(dz, w_o, r16)) <= SMALL
    assert error(edge_scores(dz, w_o, r), scored(dz, w_o, r)) <= SMALL


@pytest.mark.parametrize(("tokens", "heads", "readers"), [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
def test_nothing(tokens: int, heads: int, readers: int, launched: list[str]) -> None:
    scores = edge_scores(*drawn(tokens, heads, 4, readers, 20))
    assert torch.equal(scores, torch.zeros(heads, readers)) and not launched


def test_the_same_bits_twice_and_through_the_operator(launched: list[str]) -> None:
    dz, w_o, r = drawn(5, 3, 4, 6, 33)
    scores = edge_scores(dz, w_o, r)
    assert torch.equal(scores, edge_scores(dz, w_o, r))
    with force("op"):
        assert torch.equal(scores, edge_scores(dz, w_o, r))
    assert launched == [CONTRACT] * 3
