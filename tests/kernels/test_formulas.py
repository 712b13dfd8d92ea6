"""The PyTorch paths: against float64 written by hand, differentiable twice, behind operators, and compiled."""

from __future__ import annotations

import pytest
import torch
from kernel_formulas import added, edited, error, statistics
from torch import Tensor

from steer.kernels import DriftStats, drift_stats, edit, force, steer_add
from steer.kernels.edit_task import EditNumbers, EditOptions
from steer.kernels.layout import gather_slots, next_power_of_2, sum_per_slot, sum_to_broadcast

ROWS, BY_TOKEN = torch.tensor([2, -1, 0]), torch.tensor([[0, 1, 2, 7], [2, 2, -1, 2], [1, 0, -5, 1]])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[0, 1, 0.5, 1], [1, 1, 1, 0.1], [1, 0, 1, 1]], dtype=dtype)[..., None]


KINDS: dict[str, tuple[dict[str, float], dict[str, bool]]] = {
    "ablate": ({"scale": 0.0}, {}),
    "clamp": ({"bias": 0.1, "low": -0.2, "high": 0.3}, {}),
    "set": ({"threshold": 0.2, "scale": 0.0, "shift": 0.7}, {}),
    "scale": ({"threshold": 0.2, "scale": 3.0}, {"gated": True}),
    "gate": ({"threshold": 0.1, "shift": 1.2}, {"relative": True, "gated": True}),
    "everything": ({"bias": 0.1, "scale": 0.5, "shift": 0.3, "low": -0.4, "high": 0.5, "threshold": 0.05}, {"relative": True}),
}


def task(kind: str, count: int, m: int = 3, width: int = 10) -> tuple[list[Tensor], dict[str, Tensor], dict[str, bool]]:
    """([h, read, write, strength], numbers, flags)."""
    values, flags = KINDS[kind]
    numbers = {name: value + 0.05 * random(count, m, seed=20 + i) for i, (name, value) in enumerate(values.items())}
    read, write = random(count, m, width, seed=1) / width**0.5, random(count, m, width, seed=2) / m
    return [random(3, 4, width), read, write, random(3, 1, 1, seed=3)], numbers, flags


# ---- values and gradients


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slots", [None, ROWS, BY_TOKEN], ids=["one", "rows", "tokens"])
def test_steer_add(slots: Tensor | None, norm: bool) -> None:
    tensors = [random(3, 4, 10), random(3, 10, seed=1), random(3, 1, 1, seed=2), mask()]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    result, expected = steer_add(*tensors[:2], *tensors[2:], slots, norm), added(*tensors, slots, norm)
    assert error(result, expected) <= 1e-14
    pull = random(3, 4, 10, seed=9)
    for a, b in zip(torch.autograd.grad(result, tensors, pull), torch.autograd.grad(expected, tensors, pull), strict=True):
        assert error(a, b) <= 1e-13
    still = torch.autograd.gradgradcheck(lambda h, v: steer_add(h, v, slots=slots, preserve_norm=norm), (tensors[0], tensors[1]))
    assert still and torch.equal(result[0, 0], tensors[0][0, 0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slots", [None, ROWS, BY_TOKEN], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_edit(kind: str, slots: Tensor | None, norm: bool) -> None:
    (h, read, write, strength), numbers, flags = task(kind, 1 if slots is None else 3)
    learned = [number for name, number in numbers.items() if name != "threshold"]
    tensors = [tensor.requires_grad_() for tensor in (h, read, write, strength, *learned)]
    result = edit(h, read, write, strength=strength, mask=mask(), slots=slots, preserve_norm=norm, **numbers, **flags)
    expected = edited(h, read, write, numbers, strength, mask(), slots, preserve_norm=norm, **flags)
    assert error(result, expected) <= 1e-14 and torch.equal(result[0, 0], h[0, 0])
    pull = random(3, 4, 10, seed=9)
    for a, b in zip(torch.autograd.grad(result, tensors, pull), torch.autograd.grad(expected, tensors, pull), strict=True):
        assert error(a, b) <= 1e-12


def test_the_ways_to_name_an_edit() -> None:
    """Rows of one slot, numbers without dimensions, the same vectors to read and to write, a whole rank."""
    h, q = random(2, 4, 10), torch.linalg.qr(random(10, 3))[0].mT
    assert error(edit(h, q, scale=0.0), h - h @ q.mT @ q) <= 1e-14
    assert error(edit(h, q, scale=torch.tensor(0.5)), h - 0.5 * h @ q.mT @ q) <= 1e-14
    assert torch.equal(edit(h, q), h), "nothing was asked for"
    assert error(edit(h, q, low=-0.125, high=torch.full((3,), 0.25)) @ q.mT, (h @ q.mT).clamp(-0.125, 0.25)) <= 1e-14
    assert error(edit(h, q, low=1.0, high=-1.0), h + (-1 - h @ q.mT) @ q) <= 1e-14, "the upper bound wins, as in torch.clamp"
    many = random(400, 10, seed=4)
    assert error(edit(h, many, scale=0.9, preserve_norm=True).norm(dim=-1), h.norm(dim=-1)) <= 1e-14
    shared = edit(h, q, shift=torch.tensor([[0.0] * 3, [1.0] * 3]), slots=torch.tensor([0, 1]))
    assert torch.equal(shared[0], h[0]) and error(shared[1], h[1] + q.sum(0)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Computed in fp32, whatever autocast says; norms of 1e4 do not overflow."""
    h, u = (1e3 * random(2, 9, 64)).to(dtype), random(2, 64, seed=1, dtype=torch.float32) / 8
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            cut, added_to, stats = edit(h, u, scale=0.0), steer_add(h, u[0], 1e4, preserve_norm=True), drift_stats(h, u)
        for result, expected in (
            (cut, h.double() - h.double() @ u.double().mT @ u.double()),
            (added_to, added(h.double(), u.double(), torch.full((1, 1, 1), 1e4), torch.ones(2, 9, 1), None, True)),
        ):
            assert result.dtype is dtype and (result != expected.to(dtype)).float().mean() <= 0.02
        assert error(stats.projections, h.double() @ u.double().mT) <= 1e-6 and error(stats.sum, h.double().sum((0, 1))) <= 1e-6


def test_drift_stats() -> None:
    h, u, weight = random(3, 4, 10, dtype=torch.float32), random(2, 10, seed=1, dtype=torch.float32), mask(torch.float32)[..., 0]
    h[..., 3] += 3000
    h[weight == 0] = torch.nan
    for path in ("aten", "op"):
        with force(path):
            result = drift_stats(h, u, weight[..., None], bins=5, low=-1.0, high=torch.ones(2))
        expected = statistics(h, u, weight, -1.0, 1.0, 5)
        for name in DriftStats._fields:
            assert error(getattr(result, name), expected[name]) <= (1e-5 if name == "m2" else 5e-7), name
        empty = drift_stats(h[:0], u, bins=5)
        assert float(empty.n) == 0 and not empty.m2.any() and empty.projections.shape == (0, 4, 2) and not empty.histogram.any()
        nobody = drift_stats(h, u, torch.zeros(3, 4, 1), bins=5)
        assert float(nobody.n) == 0 and not nobody.sum.any() and not nobody.histogram.any() and not nobody.projections.any()
    assert not drift_stats(random(2, 3, 4).requires_grad_()).norms.requires_grad
    many = drift_stats(h, random(80, 10, dtype=torch.float32), weight[..., None], channels=False)
    assert many.projections.shape == (3, 4, 80) and many.sum is None


def test_norms_of_0() -> None:
    """A norm of 0, before or after, must not divide by 0."""
    v = random(1, 8, seed=1)
    h = torch.cat([torch.zeros(1, 8, dtype=torch.float64), -v, v])[:, None].requires_grad_()
    for out in (steer_add(h, v, preserve_norm=True), edit(h, v / v.norm(), scale=0.0, preserve_norm=True)):
        (slope,) = torch.autograd.grad(out.sum(), h)
        assert torch.isfinite(out).all() and torch.isfinite(slope).all() and not out[0].any()


# ---- the same by hand, behind an operator


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slots", [None, ROWS, BY_TOKEN], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_written_by_hand(kind: str, slots: Tensor | None, norm: bool) -> None:
    (h, read, write, strength), numbers, flags = task(kind, 1 if slots is None else 3)
    learned = [number for name, number in numbers.items() if name != "threshold"]
    tensors = [tensor.requires_grad_() for tensor in (h, read, write, strength, *learned)]
    results = []
    for path in ("aten", "op"):
        with force(path):
            out = edit(h, read, write, strength=strength, mask=mask(), slots=slots, preserve_norm=norm, **numbers, **flags)
        results.append([out, *torch.autograd.grad(out, tensors, random(3, 4, 10, seed=9))])
    for a, b in zip(*results, strict=True):
        assert error(b, a) <= (1e-12 if b.dim() == 3 and b.shape[-1] == 10 else 1e-6)  # small gradients are summed in fp32


def test_the_operators_keep_their_promises() -> None:
    """Shapes, aliases, and what autograd does with them under tracing."""
    (h, read, write, _), numbers, flags = task("everything", 1)
    own_numbers = [numbers.get(name) for name in EditNumbers._fields]
    weight = torch.ones(1, 1, dtype=torch.float64)
    for norm in (False, True):
        options = EditOptions(0.0, flags.get("relative", False), False, norm)
        arguments = (h.requires_grad_(), read.requires_grad_(), write, weight, None, *own_numbers, *options)
        torch.library.opcheck(torch.ops.steer.edit, arguments)
    few = h.detach().float()
    u, ends = read[0].detach().float(), (torch.zeros(3), torch.ones(3))
    for channels, bins in ((True, 4), (False, 0)):
        torch.library.opcheck(
            torch.ops.steer.drift_stats, (few, u, weight.float(), *(ends if bins else (None, None)), bins, channels, not channels)
        )


def test_compiled_code_gets_one_graph_and_the_same_numbers() -> None:
    """Through dynamo and AOTAutograd, whose tracing of operators and of gradients is where they would break."""
    h, bank = random(2, 4, 10, dtype=torch.float32), random(12, 10, seed=1, dtype=torch.float32) / 5
    slots = torch.tensor([1, 0])

    def edits(h: Tensor, bank: Tensor) -> Tensor:
        h = steer_add(h, bank[:2], torch.ones(2, 1, 1), mask(torch.float32)[:2], slots, True)
        h = edit(h, bank[:3], low=0.1, preserve_norm=True)
        return edit(h, bank, threshold=0.1, scale=0.0) + drift_stats(h, bank).projections.sum().float()

    def gradients(function: object) -> tuple[Tensor, ...]:
        own = [h.clone().requires_grad_(), bank.clone().requires_grad_()]
        out = function(*own)  # type: ignore[operator]
        return (out, *torch.autograd.grad(out.square().sum(), own))

    expected = gradients(edits)
    for path in ("auto", "op"):
        torch._dynamo.reset()
        with force(path):
            result = gradients(torch.compile(edits, backend="aot_eager", fullgraph=True))
        assert all(error(a, b) <= 1e-5 for a, b in zip(result, expected, strict=True))
    torch._dynamo.reset()


def test_new_shapes_are_traced_as_any_shape() -> None:
    """Once for a new number of tokens, once for a new batch, and not again."""
    bank, graphs = random(12, 16, dtype=torch.float32) / 4, []

    def edits(h: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        h = steer_add(h, bank[:2], torch.ones(1, 1, 1), mask, slots, True)
        return edit(edit(h, bank[:3], low=0.1, mask=mask, preserve_norm=True), bank, threshold=0.1, scale=0.0, mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(edits, backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True)
    for batch, tokens in ((2, 4), (2, 7), (2, 9), (3, 5), (4, 6)):
        inputs = random(batch, tokens, 16, dtype=torch.float32), torch.ones(batch, tokens, 1), torch.arange(batch) % 2
        assert error(compiled(*inputs), edits(*inputs)) <= 1e-5
    assert len(graphs) == 3
    torch._dynamo.reset()


# ---- parts


@pytest.mark.parametrize("slots", [None, ROWS.view(3, 1), BY_TOKEN], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_of_slots(slots: Tensor | None, count: int) -> None:
    x = random(3, 4, 2)
    expected = torch.zeros(count, 2, dtype=torch.float64)
    for b in range(3):
        for t in range(4):
            slot = 0 if slots is None else int(slots[b, t % slots.shape[1]])
            if 0 <= slot < count:
                expected[slot] += x[b, t]
    assert error(sum_per_slot(x, slots, count), expected) <= 1e-14
    assert gather_slots(random(3, 5), slots).shape == ((1, 1, 5) if slots is None else (*slots.shape, 5))


def test_sums_to_what_was_broadcast() -> None:
    x = random(3, 4)
    for shape in ((1, 1), (3, 1), (1, 4), (3, 4)):
        assert error(sum_to_broadcast(x, random(*shape)), x.sum_to_size(shape)) <= 1e-14
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]
