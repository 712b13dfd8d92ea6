"""Edge scores where no kernel runs: the PyTorch form against float64 by hand, its memory, the operator, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_formulas import error, scored
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from steer.errors import ConfigError, WidthError
from steer.kernels import edge_scores, force, writer_outputs

HEADS, D, READERS, WIDTH = 3, 4, 7, 10


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


DZ, W_O, R = numbers(2, 5, HEADS, D, seed=0), numbers(WIDTH, HEADS * D, seed=1), numbers(2, 5, READERS, WIDTH, seed=2)
OUTPUTS = numbers(2, 5, HEADS, WIDTH, seed=3)


@pytest.mark.parametrize("path", ["auto", "aten", "op", "traced", "compiled"])
@pytest.mark.parametrize("most", [1, 1 << 26])
def test_edge_scores(path: str, most: int) -> None:
    def run() -> tuple[Tensor, Tensor]:
        return edge_scores(DZ, W_O, R, max_bytes=most), edge_scores(OUTPUTS, None, R, max_bytes=most)

    if path == "traced":
        with FlopCounterMode(display=False):
            results = run()
    elif path == "compiled":
        results = torch.compile(run, backend="aot_eager", fullgraph=True)()
    else:
        with force(path):
            results = run()
    assert error(results[0], scored(DZ, W_O, R)) <= 1e-14 and error(results[1], scored(OUTPUTS, None, R)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    dz, w_o, r = DZ.to(dtype), W_O.to(dtype), R.to(dtype)
    scores = edge_scores(dz, w_o, r)
    assert scores.dtype is torch.float32 and error(scores, scored(dz, w_o, r)) <= 5e-7
    assert edge_scores(dz, w_o, R).dtype is torch.float64  # mixed: the widest


def test_any_layout_gives_the_same_scores() -> None:
    expected = scored(DZ, W_O, R)
    readers_first = R.movedim(2, 0).contiguous().movedim(0, 2)  # [R, batch, tokens, width] in memory
    conv1d = W_O.T.contiguous()
    for dz, w_o, r in (
        (DZ, conv1d.T, readers_first),
        (DZ.transpose(0, 1), W_O, R.transpose(0, 1)),
        (DZ.flatten(0, 1), W_O, R.flatten(0, 1)),
        (DZ.transpose(2, 3).contiguous().transpose(2, 3), W_O, R.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        assert error(edge_scores(dz, w_o, r), expected) <= 1e-14
    one = edge_scores(DZ[0, 0], W_O, R[0, 0])  # a single token has no leading dimensions
    assert error(one, scored(DZ[0, 0], W_O, R[0, 0])) <= 1e-14


def test_what_heads_write_adds_up_to_the_projection() -> None:
    written = writer_outputs(DZ, W_O)
    assert written.shape == (2, 5, HEADS, WIDTH) and error(written.sum(2), DZ.flatten(2) @ W_O.T) <= 1e-14
    assert writer_outputs(DZ[0, 0], W_O).shape == (HEADS, WIDTH) and writer_outputs(DZ.bfloat16(), W_O.bfloat16()).dtype is torch.float32
    assert error(edge_scores(written, None, R), edge_scores(DZ, W_O, R)) <= 1e-14


@pytest.mark.parametrize("shape", [(0, HEADS, D), (2, 0, HEADS, D)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    assert torch.equal(edge_scores(torch.zeros(shape), W_O.float(), torch.zeros(*shape[:-2], READERS, WIDTH)), torch.zeros(HEADS, READERS))


def test_scores_have_no_gradient() -> None:
    tensors = [tensor.clone().requires_grad_() for tensor in (DZ, W_O, R)]
    for path in ("auto", "op"):
        with force(path):
            assert not edge_scores(*tensors).requires_grad


def test_memory_is_bounded_whatever_the_number_of_tokens() -> None:
    """The largest tensor of numbers per token that is made: outputs of a chunk, never of all."""
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None and not function.is_view:
                sizes[-1] = max(sizes[-1], result.numel() * result.itemsize)
            return result

    dz, w_o, r = torch.randn(64, HEADS, D), W_O.float(), torch.randn(64, 2, WIDTH)
    for tokens in (16, 64):
        sizes.append(0)
        with Largest():
            edge_scores(dz[:tokens], w_o, r[:tokens], max_bytes=8 * HEADS * WIDTH * 4)
    assert sizes == [8 * HEADS * WIDTH * 4] * 2


def test_the_operator_is_as_torch_wants_it() -> None:
    torch.library.opcheck(torch.ops.steer.edge_scores, (DZ[0], W_O, R[0], 1 << 20))
    torch.library.opcheck(torch.ops.steer.edge_scores, (OUTPUTS[0].bfloat16(), None, R[0].bfloat16(), 1 << 20))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "heads of another number": (lambda: edge_scores(DZ[..., 1:, :], W_O, R), WidthError, "weight \\[width, 8\\]"),
    "a weight the other way round": (lambda: edge_scores(DZ, W_O.T, R), WidthError, "Conv1D transposed"),
    "readers of another width": (lambda: edge_scores(DZ, W_O, R[..., 1:]), WidthError, "2, 5, readers, 10"),
    "readers of other tokens": (lambda: edge_scores(DZ, W_O, R[:, 1:]), WidthError, "2, 4, 7, 10"),
    "readers without tokens": (lambda: edge_scores(DZ, W_O, R[0, 0]), WidthError, "same tokens"),
    "heads that are not split": (lambda: edge_scores(DZ[0, 0, 0], W_O, R), WidthError, "heads x head width"),
    "no dimensions": (lambda: edge_scores(DZ[0, 0, 0], None, R[0, 0, 0]), WidthError, "readers, width"),
    "another device": (lambda: edge_scores(DZ, W_O, R.to("meta")), ConfigError, "dz on cpu"),
    "no bytes": (lambda: edge_scores(DZ, W_O, R, max_bytes=0), ConfigError, "at least 1"),
    "outputs of heads that do not fit": (lambda: writer_outputs(DZ, W_O[:, 1:]), WidthError, "split the input"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()
