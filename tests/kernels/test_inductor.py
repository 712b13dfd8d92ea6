"""What Inductor makes of the PyTorch paths on a GPU, without one: kernels launched and passes over the activation counted in its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import VERSION, Code, empty, generated
from torch import Tensor, nn

from steer.kernels import drift_stats, edit, force, steer_add

pytest.importorskip("triton", reason="there is no Triton for this system")
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(f"{VERSION}."), reason=f"looks into torch {VERSION}, and this is {torch.__version__}"
)

BATCH, TOKENS, WIDTH = 4, 2048, 4096
PASS = BATCH * TOKENS * WIDTH * 2  # bytes of one read or write of a bf16 activation
BF16, LONG = torch.bfloat16, torch.long

Edit = Callable[..., Tensor]
Shapes = list[tuple[tuple[int, ...], torch.dtype]]
FP32, ONE = torch.float32, ((1, 1, 1), torch.float32)
MASK, ROWS = ((BATCH, TOKENS, 1), BF16), ((BATCH,), LONG)
EDITS: dict[str, tuple[Edit, Shapes]] = {
    "add": (lambda h, v, a: steer_add(h, v, a), [((WIDTH,), FP32), ONE]),
    "add, rows, norm kept": (lambda h, v, a, m, s: steer_add(h, v, a, m, s, True), [((8, WIDTH), FP32), ONE, MASK, ROWS]),
    "ablate rank 4": (lambda h, u, a, m: edit(h, u, scale=0.0, strength=a, mask=m), [((4, WIDTH), FP32), ONE, MASK]),
    "clamp, rows, norm kept": (
        lambda h, u, n, a, m, s: edit(h, u, low=n, high=n, strength=a, mask=m, slots=s, preserve_norm=True),
        [((8, 1, WIDTH), FP32), ((8, 1), FP32), ONE, MASK, ROWS],
    ),
    "gate": (
        lambda h, u, v, n, a: edit(h, u, v, threshold=n, relative=True, gated=True, shift=1.0, strength=a),
        [((1, WIDTH), FP32), ((1, WIDTH), FP32), ((1,), FP32), ONE],
    ),
    "set 8 features": (
        lambda h, u, v, n, a: edit(h, u, v, bias=n, threshold=n, scale=0.0, shift=n, strength=a),
        [((8, WIDTH), FP32), ((8, WIDTH), FP32), ((8,), FP32), ONE],
    ),
}


def made(shapes: Shapes) -> list[Tensor]:
    return [empty(*shape, dtype=dtype) for shape, dtype in shapes]


def states() -> Tensor:
    return empty(BATCH, TOKENS, WIDTH, dtype=BF16)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_one_kernel_and_two_passes(name: str) -> None:
    function, shapes = EDITS[name]
    code = generated(function, lambda: [states(), *made(shapes)])
    assert (code.kernels, code.calls) == (1, 0) and 2 <= code.moved / PASS <= 2.05


class Layer(nn.Module):
    """What follows and precedes the output of a block: products, the sums of the residual stream, the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=False, dtype=BF16) for a, b in ((WIDTH, 128), (128, WIDTH)))
        self.weight = empty(WIDTH, dtype=BF16)

    def forward(self, h: Tensor) -> Tensor:
        full = h.float()
        normed = self.weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
        return h + self.down(torch.nn.functional.silu(self.up(normed)))


def three_layers(function: Edit | None, shapes: Shapes) -> Code:
    def inputs() -> list[Tensor]:
        nonlocal layers
        layers = [Layer() for _ in range(3)]
        return [states(), *made(shapes)]

    layers: list[Layer] = []

    def run(h: Tensor, *rest: Any) -> Tensor:
        for layer in layers:
            handle = None if function is None else layer.register_forward_hook(lambda module, args, output: function(output, *rest))
            h = layer(h)
            if handle is not None:
                handle.remove()
        return h

    return generated(run, inputs)


def test_an_edit_at_every_layer_costs_no_kernel_and_no_pass() -> None:
    """A norm that is kept costs one pass: Inductor takes the rounding to bf16 out of what the next norm reads, and writes fp32 for it."""
    bare = three_layers(None, [])
    for name in ("add, rows, norm kept", "ablate rank 4", "clamp, rows, norm kept"):
        steered = three_layers(*EDITS[name])
        assert steered.kernels <= bare.kernels and steered.calls == bare.calls, name
        assert (steered.moved - bare.moved) / PASS <= 3 * ("norm kept" in name) + 0.05, name


def test_behind_an_operator_it_would_cost_both() -> None:
    """Why compiled code gets PyTorch operations: an operator is closed to fusion, and what precedes and follows it moves more."""
    bare = three_layers(None, [])
    with force("op"):
        opaque = three_layers(*EDITS["ablate rank 4"])
    assert opaque.calls == bare.calls + 3 and opaque.kernels > bare.kernels


@pytest.mark.parametrize(("m", "operators"), [(8, 0), (9, 1)])
def test_many_directions_and_statistics_are_one_operator(m: int, operators: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.kernels.dispatch.runs_triton", lambda h: True)
    monkeypatch.setattr("torch.Tensor.is_cuda", property(lambda self: True))
    code = generated(lambda h, u: edit(h, u, scale=0.0), lambda: [states(), empty(m, WIDTH)])
    assert code.calls == operators and code.text.count("torch.ops.steer.edit") >= operators
    if operators:
        assert generated(lambda h, u: drift_stats(h, u)[:5], lambda: [states(), empty(m, WIDTH)]).calls == 1
