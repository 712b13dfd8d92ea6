"""What Inductor makes of the PyTorch forms on a GPU, without one: kernels launched and passes over the activation counted in its code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_cuda import VERSION, Code, empty, generated
from torch import Tensor, nn

from steer.kernels import drift_stats, edit, force

pytest.importorskip("triton", reason="there is no Triton for this system")
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(f"{VERSION}."), reason=f"looks into torch {VERSION}, and this is {torch.__version__}"
)
DOCS = str(Path(__file__).resolve().parents[2] / "docs")
WIDTH, BF16 = 4096, torch.bfloat16


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, DOCS)
    try:
        return importlib.import_module("make_kernel_table")
    finally:
        sys.path.remove(DOCS)


@pytest.fixture(scope="module")
def counted(script: ModuleType) -> dict[str, dict[str, Any]]:
    return script.counted()


def test_an_edit_is_one_kernel_and_two_passes(counted: dict[str, dict[str, Any]]) -> None:
    edits = {name: row for name, row in counted.items() if "drift" not in name and "16 features" not in name}
    assert len(edits) == 8
    for name, row in edits.items():
        passes, kernels, calls = row["compiled"]
        assert (kernels, calls) == (1, 0) and 2 <= passes <= 2.05, name


def test_a_triton_kernel_moves_what_it_must(script: ModuleType, counted: dict[str, dict[str, Any]]) -> None:
    nothing = {"add a vector", "add, a slot for each row, mask"}  # is left to do backward
    for name, row in counted.items():
        forward, launches, backward, back_launches = row["triton"]
        if "drift" in name:
            assert forward <= 1.15 and launches == 2, name
            continue
        floor = 0 if name in nothing else 3 if "norm kept" in name else 2
        assert forward <= 2.05 and launches == 1 and backward <= floor + 0.05 and back_launches == (floor > 0), name
        assert row["kept"][1] <= (16 if "add" in name else 16 + 4 * 16), name


def test_the_table_of_the_page_is_up_to_date(script: ModuleType, counted: dict[str, dict[str, Any]]) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.updated(counted), "run python docs/make_kernel_table.py"


def test_a_measured_run_gets_a_column(script: ModuleType, counted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert "measured" not in script.table(counted)
    row = '{"task": "add, rows", "us": 31.4, "fraction": 0.93}'
    (tmp_path / "2031-02-03_gpu.json").write_text(f'{{"card": "H9", "date": "2031-02-03", "kernels": [{row}]}}')
    assert "measured on H9, 2031-02-03 |" in script.table(counted) and "31 us, 93% of copy" in script.table(counted)


# ---- in a decoder


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


def three_layers(script: ModuleType, edited: Callable[..., Tensor] | None, rest: Any = ()) -> Code:
    """With the edit at the output of each of them."""
    layers: list[Layer] = []

    def inputs() -> list[Tensor]:
        layers[:] = [Layer() for _ in range(3)]
        return [empty(script.BATCH, script.TOKENS, WIDTH, dtype=BF16), *(empty(*shape, dtype=dtype) for shape, dtype in rest)]

    def run(h: Tensor, *tensors: Tensor) -> Tensor:
        for layer in layers:
            handle = layer.register_forward_hook(lambda module, args, output: None if edited is None else edited(output, *tensors))
            h = layer(h)
            handle.remove()
        return h

    return generated(run, inputs)


def test_an_edit_at_every_layer_costs_no_kernel_and_no_pass(script: ModuleType) -> None:
    """A norm that is kept costs one pass: Inductor takes the rounding to bf16 out of what the next norm reads, and writes fp32 for it."""
    bare = three_layers(script, None)
    for name in ("the same, norm kept", "ablate rank 4", "clamp a projection, norm kept", "add where the cosine is over a threshold"):
        case = script.CASES[name]
        steered = three_layers(script, case.run, case.shapes)
        assert steered.kernels <= bare.kernels and steered.calls == bare.calls, name
        assert (steered.moved - bare.moved) / script.PASS <= 3 * ("norm kept" in name) + 0.05, name


def test_behind_an_operator_it_would_cost_both(script: ModuleType) -> None:
    """Why compiled code gets PyTorch operations: an operator is closed to fusion, and what precedes and follows it moves more."""
    bare, case = three_layers(script, None), script.CASES["ablate rank 4"]
    with force("op"):
        opaque = three_layers(script, case.run, case.shapes)
    assert opaque.calls == bare.calls + 3 and opaque.kernels > bare.kernels


@pytest.mark.parametrize(("m", "operators"), [(8, 0), (9, 1)])
def test_many_directions_and_statistics_are_one_operator(
    m: int, operators: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.kernels.dispatch.can_run_triton", lambda h: True)
    monkeypatch.setattr("torch.Tensor.is_cuda", property(lambda self: True))

    def inputs() -> list[Tensor]:
        return [empty(script.BATCH, script.TOKENS, WIDTH, dtype=BF16), empty(m, WIDTH)]

    code = generated(lambda h, u: edit(h, u, scale=0.0), inputs)
    assert code.calls == operators and code.text.count("torch.ops.steer.edit") >= operators
    if operators:
        assert generated(lambda h, u: drift_stats(h, u)[:5], inputs).calls == 1
