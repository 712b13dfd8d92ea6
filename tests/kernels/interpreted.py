"""The Triton kernels in Triton's interpreter against float64; run by test_interpreter.py in a process of its own, with
TRITON_INTERPRET=1.

fp32 only, since the interpreter truncates what it stores in bf16, and few tokens, since a program costs it 3 ms. What the kernels
allocate is poisoned and stands between two red zones: a place that nothing is written to, or a write beside it, shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from interpreter_memory import OUT, SMALL, random
from kernel_formulas import added, edited, error, statistics, surrounded
from torch import Tensor

from steer.kernels import DriftStats, drift_stats, edit, force, steer_add

pytest_plugins = ["interpreter_memory"]  # fixtures

# the functions of a package hide its modules of the same name
steer_add_file, drift_file, weighted_sum_file, scalar_file, tiles_file = (
    importlib.import_module(f"steer.kernels.{name}") for name in ("steer_add", "drift_stats", "weighted_sum", "edit_scalar", "edit_tiles")
)


def sparse_mask(batch: int, tokens: int) -> Tensor:
    """0, 1 and a share in between."""
    return torch.tensor([0.0, 1.0, 0.4, 1.0]).repeat(batch * tokens)[: batch * tokens].view(batch, tokens, 1)


SLOTS = {
    "one for all": None,
    "rows": torch.tensor([2, -(1 << 40), 0]),
    "tokens": torch.tensor([[0, 1, 2, 7, -1], [2, 2, 2, 2, 2], [1, 0, -(1 << 30), 1, 3]], dtype=torch.int32),
}


def against(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor], tensors: dict[str, Tensor], fixed: frozenset[str] = frozenset()
) -> Tensor:
    """Values and gradients of both; the kernel gets its activation and incoming gradient from the midst of not-a-numbers."""
    single = {name: tensor.clone().requires_grad_(name not in fixed) for name, tensor in tensors.items()}
    single["h"] = surrounded(tensors["h"]).requires_grad_()
    double = {name: tensor.double().requires_grad_(name not in fixed) for name, tensor in tensors.items()}
    result, expected = kernel(**single), formula(**double)
    pull = random(*expected.shape, seed=9)
    learned = [name for name in tensors if name not in fixed]
    g_result = torch.autograd.grad(result, [single[name] for name in learned], surrounded(pull))
    g_expected = torch.autograd.grad(expected, [double[name] for name in learned], pull.double())
    assert error(result, expected) <= OUT
    for name, a, b in zip(learned, g_result, g_expected, strict=True):
        assert error(a, b) <= (OUT if name == "h" else SMALL), name
    return result.detach()


# ---- steer_add


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("which", SLOTS)
def test_steer_add(which: str, norm: bool, launched: list[str]) -> None:
    slots = SLOTS[which]
    tensors = {"h": random(3, 5, 33), "bank": random(3, 33, seed=1), "strength": random(3, 1, 1, seed=2), "mask": sparse_mask(3, 5)}
    result = against(
        lambda h, bank, strength, mask: steer_add(h, bank, strength, mask, slots, norm),
        lambda h, bank, strength, mask: added(h, bank, strength, mask, slots, norm),
        tensors,
    )
    untouched = (tensors["mask"][..., 0] == 0) | (slots is not None and (slots.view(3, -1) < 0) | (slots.view(3, -1) > 2))
    assert torch.equal(result[untouched], tensors["h"][untouched]) and not torch.equal(result[~untouched], tensors["h"][~untouched])
    assert launched == ["steer_add.forward", *["steer_add.backward"] * norm, "weighted_sum.sum"]


def test_steer_add_goes_over_a_wide_row_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer_add_file, "MAX_BLOCK_SIZE", 32)
    tensors = {"h": random(2, 3, 100), "bank": random(1, 100, seed=1), "strength": random(1, 1, 1, seed=2)}
    mask = torch.ones(2, 3, 1)
    against(
        lambda h, bank, strength: steer_add(h, bank, strength, None, None, True),
        lambda h, bank, strength: added(h, bank, strength, mask, None, True),
        tensors,
    )


def test_steer_add_of_nothing_to_nothing() -> None:
    """A norm of 0, before or after, must not divide by 0; nor must a batch without tokens."""
    v = random(1, 16, seed=1)
    h = torch.cat([torch.zeros(1, 16), -v, v])[:, None].requires_grad_()
    out = steer_add(h, v, preserve_norm=True)
    out.backward(torch.ones_like(out))
    assert torch.isfinite(out).all() and torch.isfinite(h.grad).all()
    assert torch.equal(out[0], torch.zeros(1, 16)) and torch.equal(out[1], torch.zeros(1, 16))
    for shape in ((0, 5, 16), (2, 0, 16), (0, 16)):
        nothing = torch.zeros(shape).requires_grad_()
        steer_add(nothing, v.clone().requires_grad_(), preserve_norm=True).sum().backward()
        assert nothing.grad.shape == shape


def test_tokens_of_weight_0_are_not_looked_at() -> None:
    """They and their vectors may hold anything, and are left as they are."""
    h, mask, slots = random(2, 3, 20), torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1), torch.tensor([[0, 1, 0], [0, 0, 2]])
    h[:, 1, ::2] = torch.inf
    bank = torch.stack([random(20, seed=1), torch.full((20,), torch.nan), torch.full((20,), torch.nan)])[:2]
    pull = random(2, 3, 20, seed=3)

    def check(run: Callable[[Tensor], Tensor]) -> None:
        own = h.clone().requires_grad_()
        out = run(own)
        (slope,) = torch.autograd.grad(out, own, pull)
        assert torch.equal(out[:, 1], h[:, 1]) and torch.isfinite(out[:, ::2]).all() and not torch.equal(out[0, 0], h[0, 0])
        assert torch.equal(slope[:, 1], pull[:, 1]) and torch.isfinite(slope).all()

    for norm in (False, True):
        check(lambda own, norm=norm: steer_add(own, bank, 1.0, mask, slots, norm))
        check(lambda own, norm=norm: edit(own, random(2, 20, seed=2), scale=0.5, mask=mask, preserve_norm=norm))
        check(lambda own, norm=norm: edit(own, random(2, 20, seed=2), low=0.5, mask=mask, preserve_norm=norm))
    check(lambda own: edit(own, random(20, 20, seed=2), scale=0.5, mask=mask))
    check(lambda own: edit(own, random(20, 20, seed=2), high=0.1, mask=mask))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 1, 2, 16)])
def test_steer_add_takes_activations_of_any_dimension(shape: tuple[int, ...]) -> None:
    h, v = random(*shape), random(1, 16, seed=1)
    assert error(steer_add(h, v, 0.5), h.double() + 0.5 * v[0].double()) <= OUT
    crossed = random(16, 4).T  # the numbers of a row lie apart
    assert error(steer_add(crossed, v), crossed.double() + v.double()) <= OUT


# ---- edit

KINDS: dict[str, tuple[dict[str, float], dict[str, bool]]] = {
    "ablate": ({"scale": 0.0}, {}),
    "clamp": ({"bias": 0.1, "low": -0.2, "high": 0.3}, {}),
    "floor": ({"low": 0.1}, {}),
    "ceiling": ({"high": -0.1, "scale": 2.0, "shift": 0.2}, {}),
    "set a feature": ({"bias": 0.1, "threshold": 0.2, "scale": 0.0, "shift": 0.7}, {}),
    "scale a feature": ({"threshold": 0.2, "scale": 3.0}, {"gated": True}),
    "gate": ({"threshold": 0.03, "shift": 1.2}, {"relative": True, "gated": True}),
    "everything": ({"bias": 0.1, "scale": 0.5, "shift": 0.3, "low": -0.4, "high": 0.5, "threshold": 0.02}, {"relative": True}),
}
NEVER = frozenset({"threshold"})  # is learned


def edit_case(kind: str, m: int, slots: Tensor | None, norm: bool, width: int = 33) -> None:
    values, flags = KINDS[kind]
    flags = {**flags, "preserve_norm": norm}
    count = 1 if slots is None else 3
    numbers = {name: value + 0.05 * random(count, m, seed=20 + i) for i, (name, value) in enumerate(values.items())}
    tensors = {
        "h": random(3, 5, width),
        "read": random(count, m, width, seed=1) / width**0.5,
        "write": random(1 if kind == "floor" else count, m, width, seed=2).expand(count, -1, -1) / m,
        "strength": random(3, 1, 1, seed=3),
        "mask": sparse_mask(3, 5),
        **numbers,
    }
    result = against(
        lambda h, read, write, strength, mask, **own: edit(h, read, write, strength=strength, mask=mask, slots=slots, **own, **flags),
        lambda h, read, write, strength, mask, **own: edited(h, read, write, own, strength, mask, slots, **flags),
        tensors,
        NEVER,
    )
    assert torch.equal(result[tensors["mask"][..., 0] == 0], tensors["h"][tensors["mask"][..., 0] == 0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_edit_along_few_directions(kind: str, norm: bool, launched: list[str]) -> None:
    edit_case(kind, 2, SLOTS["rows"] if norm else None, norm)
    assert launched == ["edit_scalar.forward", "edit_scalar.backward"] + ["weighted_sum.sum"] * 2


def test_edit_with_slots_of_tokens() -> None:
    edit_case("everything", 2, SLOTS["tokens"], True)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_along_many_directions(kind: str, launched: list[str]) -> None:
    edit_case(kind, 19, SLOTS["rows"] if kind in ("clamp", "everything") else None, False, width=70)
    assert launched == ["edit_tiles.forward", "edit_tiles.backward"] + ["weighted_sum.sum"] * 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tile_size", [16, 32, 64])
def test_edit_in_tiles_of_every_size_and_order(tile_size: int, reverse: bool, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Launch parameters that benchmarks/gpu.py sweeps; the last tile of a row is not full."""
    parameters = tiles_file.TilesLaunch(tile_size, 32, reverse, 4, 2)
    monkeypatch.setattr(tiles_file, "default_launch", lambda tokens, m, dtype: parameters)
    read, write = random(3, 19, 70, seed=1) / 9, random(3, 19, 70, seed=2) / 19
    tensors = {"h": random(3, 20, 70), "read": read, "write": write, "low": random(19, seed=3)}

    def formula(**tensors: Tensor) -> Tensor:
        with force("aten"):  # in float64; test_formulas.py compares it with the formula by hand, which for so many tokens takes seconds
            return edit(slots=SLOTS["rows"], **tensors)

    against(lambda **tensors: edit(slots=SLOTS["rows"], **tensors), formula, tensors, frozenset({"read", "write"}))
    assert launched[:2] == ["edit_tiles.forward", "edit_tiles.backward"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tile_size", [2, 4])
def test_edit_of_several_tokens_in_a_program(tile_size: int, norm: bool, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(scalar_file, "default_launch", lambda width: scalar_file.ScalarLaunch(tile_size, 4))
    edit_case("everything", 2, SLOTS["rows"], norm)
    edit_case("ablate", 2, None, norm)
    assert launched[:2] == ["edit_scalar.forward", "edit_scalar.backward"]


def test_many_tokens_along_more_directions_than_the_cache_holds_go_to_tiles(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    h, u = random(2, 10, 16), random(5, 16, seed=1)
    few = edit(h, u, scale=0.5)
    monkeypatch.setattr(scalar_file, "MIN_TILED_TOKENS", 20)
    assert error(edit(h, u, scale=0.5), few) <= OUT and error(few, h.double() - 0.5 * (h @ u.T @ u).double()) <= 2e-6
    assert launched == ["edit_scalar.forward", "edit_tiles.forward"]


@pytest.mark.parametrize(("m", "norm", "kernel"), [(17, True, []), (257, False, []), (16, True, ["edit_scalar.forward"])])
def test_what_no_kernel_takes_runs_in_pytorch(m: int, norm: bool, kernel: list[str], launched: list[str]) -> None:
    h, u = random(1, 2, 20), random(m, 20, seed=1) / 9
    expected = edited(
        h.double(), u[None].double(), u[None].double(), {"low": torch.zeros(1, m)}, *torch.ones(2, 1, 1, 1), None, preserve_norm=norm
    )
    assert error(edit(h, u, low=0.0, preserve_norm=norm), expected) <= 2e-6 and launched == kernel


@pytest.mark.parametrize("m", [2, 20])
def test_slots_with_vectors_of_their_own_and_numbers_in_common(m: int) -> None:
    h, pull, u, low = random(3, 5, 33), random(3, 5, 33, seed=1), random(3, m, 33, seed=2), random(m, seed=3)
    results = []
    for path in ("triton", "aten"):
        with force(path):
            own_h = h.clone().requires_grad_()
            out = edit(own_h, u, low=low, slots=torch.tensor([2, 1, 0]))
            results.append((out, *torch.autograd.grad(out, own_h, pull)))
    assert all(error(a, b) <= OUT for a, b in zip(*results, strict=True))


def test_edit_of_nothing() -> None:
    u = random(2, 16, seed=1)
    for m in (u, random(20, 16)):
        nothing = torch.zeros(2, 0, 16).requires_grad_()
        edit(nothing, m, low=0.0).sum().backward()
        assert nothing.grad.shape == (2, 0, 16)
    h = torch.zeros(1, 2, 16).requires_grad_()
    out = edit(h, u, low=0.0, preserve_norm=True)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 2, 16)) and torch.isfinite(h.grad).all()


@pytest.mark.parametrize("m", [2, 20])
def test_half_precision_keeps_the_accuracy_of_its_directions(m: int) -> None:
    """fp16, which the interpreter can do: products with fp32 directions are not rounded to fp16."""
    h, u = random(2, 8, 64).half(), random(m, 64, seed=1) / 8
    exact = h.double() + (0.7 - h.double() @ u.double().mT) @ u.double()
    result = edit(h, u, scale=0.0, shift=0.7)
    assert result.dtype is torch.float16
    assert (result.double() - exact).abs().max() <= 0.51 * 2**-10 * exact.abs().max(), "more than one rounding of the result"
    q = torch.linalg.qr(random(64, m, seed=2)).Q.mT.contiguous()
    h = (random(2, 8, m, seed=3) @ q * 8).half()  # of which nothing is left, so that the result is rounded finely
    exact = h.double() - h.double() @ q.double().mT @ q.double()
    assert (edit(h, q, scale=0.0).double() - exact).abs().max() <= 2**-18 * h.abs().max()


# ---- the operators that compiled code uses


def test_operators_run_the_kernels(launched: list[str]) -> None:
    h, u = random(2, 3, 20).requires_grad_(), random(17, 20, seed=1).requires_grad_()
    with force("op"):
        out = edit(h, u, low=0.0)
        drift_stats(h, u)
    grads = torch.autograd.grad(out.square().sum(), (h, u))
    assert launched[:4] == ["edit_tiles.forward", "drift_stats.stats", "drift_stats.merge", "edit_tiles.backward"]
    with force("aten"):
        expected = torch.autograd.grad(edit(h, u, low=0.0).square().sum(), (h, u))
    assert all(error(a, b) <= SMALL for a, b in zip(grads, expected, strict=True))
    with force("op"):  # of the activation alone, along a bank whose columns lie apart
        [only] = torch.autograd.grad(edit(h, u.detach().mT.contiguous().mT, low=0.0).square().sum(), h)
    assert torch.equal(only, grads[0])


# ---- what backward keeps


def saved_bytes(run: Callable[[], Tensor], known: list[Tensor]) -> float:
    """Bytes kept for backward, without the activation and the vectors themselves."""
    n_bytes: dict[int, int] = {}
    known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in known_storages:
            n_bytes[saved.untyped_storage().data_ptr()] = saved.numel() * saved.element_size()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run()
    return sum(n_bytes.values())


@pytest.mark.parametrize("case", ["add", "add, norm kept", "clamp, norm kept", "clamp", "ablate", "set features"])
def test_backward_keeps_little(case: str) -> None:
    """Eager PyTorch keeps 8 x width bytes for a token and a norm that is kept."""
    tokens, m, slots = 20, 3, torch.tensor([1, 0])
    h, bank = random(2, 10, 64).requires_grad_(), random(2, 64, seed=1)
    directions, bound = random(2, m, 64, seed=2), random(2, m, seed=3).requires_grad_()
    mask, strength = torch.ones(2, 10, 1), torch.ones(2, 1, 1).requires_grad_()
    runs = {
        "add": lambda: steer_add(h, bank, strength, mask, slots),
        "add, norm kept": lambda: steer_add(h, bank, strength, mask, slots, True),
        "clamp, norm kept": lambda: edit(h, directions, low=bound, mask=mask, strength=strength, slots=slots, preserve_norm=True),
        "clamp": lambda: edit(h, directions, low=bound, mask=mask, strength=strength, slots=slots),
        "ablate": lambda: edit(h, directions, scale=0.0, slots=slots),
        "set features": lambda: edit(h, directions, threshold=0.1, relative=True, shift=bound, scale=0.0, mask=mask, slots=slots),
    }
    limit = {"add": 16, "add, norm kept": 16, "ablate": 4}.get(case, 16 + 4 * m)
    assert saved_bytes(runs[case], [h, bank, directions, bound]) <= limit * tokens
    linear = {
        "ablate": runs["ablate"],
        "clamp": runs["clamp"],
        "add": lambda: steer_add(h, bank.clone().requires_grad_(), 1.0, mask, slots),
    }
    if case in linear:
        n_bytes = saved_bytes(linear[case], [bank, directions, bound])
        assert n_bytes <= limit * tokens + 2 * 64 * 4, "an edit whose norm is not kept keeps no activation"


def test_twice_the_same_bits() -> None:
    h, bank, slots = random(3, 5, 33).requires_grad_(), random(3, 2, 33, seed=1).requires_grad_(), SLOTS["rows"]

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(edit(h, bank, low=0.1, slots=slots).square().sum(), (h, bank))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


# ---- drift statistics


@pytest.mark.parametrize("tile_size", [16, 64])
@pytest.mark.parametrize(("tokens", "width", "k"), [(5, 33, 3), (70, 130, 17)])
def test_drift_stats(tokens: int, width: int, k: int, tile_size: int, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(drift_file, "default_launch", lambda n_rows, k: drift_file.StatsLaunch(tile_size, 4, 3))
    h, directions = random(2, tokens, width), random(k, width, seed=1) / width**0.5
    h[..., 3] += 3000  # a channel whose mean is 3,000 times its deviation
    weight = (sparse_mask(2, tokens) * 0.7)[..., 0]
    h[weight == 0] = torch.nan
    result = drift_stats(surrounded(h), directions, weight[..., None], bins=6, low=-1.5, high=1.5 * torch.ones(k))
    expected = statistics(h, directions, weight, -1.5, 1.5, 6)
    limits = {"n": 1e-6, "sum": 1e-6, "m2": 1e-5, "norms": OUT, "projections": OUT, "histogram": 0}
    for name in DriftStats._fields:
        assert error(getattr(result, name), expected[name]) <= limits[name], name
    assert error(result.m2[3], expected["m2"][3]) <= 1e-3, "squares that are not centred lose everything here"
    assert launched == ["drift_stats.stats", "drift_stats.merge"]


def test_drift_stats_computes_what_is_asked_for() -> None:
    h, u = random(4, 20), random(2, 20, seed=1)
    only = drift_stats(h, u, channels=False, norms=False)
    assert error(only.projections, h.double() @ u.double().T) <= OUT
    assert only.sum is only.m2 is only.norms is only.histogram is None and only.projections.shape == (4, 2)
    plain = drift_stats(h)
    assert plain.projections is plain.histogram is None and error(plain.norms, h.double().norm(dim=-1)) <= OUT
    nothing = drift_stats(h[:0], u)
    assert float(nothing.n) == 0 and float(nothing.m2.abs().sum()) == 0 and nothing.projections.shape == (0, 2)
    nobody = drift_stats(h, u, torch.zeros(4, 1), bins=3)
    assert float(nobody.n) == 0 and int(nobody.histogram.sum()) == 0 and float(nobody.projections.abs().sum()) == 0


def test_drift_stats_merges_more_tiles_than_a_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_file, "default_launch", lambda n_rows, k: drift_file.StatsLaunch(1, 4, 3))
    h, weight = random(2, 65, 20) + 30 * random(20, seed=1), sparse_mask(2, 65)
    result, expected = drift_stats(h, None, weight), statistics(h, random(1, 20), weight[..., 0], -1, 1, 2)
    assert (
        error(result.n, expected["n"]) <= 1e-6 and error(result.sum, expected["sum"]) <= 1e-6 and error(result.m2, expected["m2"]) <= 1e-5
    )


# ---- weighted sums


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("which", SLOTS)
def test_weighted_sum(which: str, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tokens are divided among programs and steps."""
    monkeypatch.setattr(weighted_sum_file, "TILE_SIZE", 8)
    division = weighted_sum_file.WorkDivision(block_size=32, n_parts=2 // tiles, tiles_per_part=tiles)
    monkeypatch.setattr(weighted_sum_file, "divide_work", lambda n_rows, n_vectors, width: division)
    x, c, slots = random(3, 5, 40), random(3, 5, 2, seed=1), SLOTS[which]
    rows_and_tokens = None if slots is None else slots.view(3, -1)
    result = weighted_sum_file.weighted_sum(surrounded(x), c, rows_and_tokens, 3)
    expected = torch.zeros(3, 2, 40, dtype=torch.float64)
    for b in range(3):
        for t in range(5):
            slot = 0 if slots is None else int(slots[b] if slots.dim() == 1 else slots[b, t])
            if 0 <= slot < 3:
                expected[slot] += c[b, t, :, None].double() * x[b, t].double()
    assert error(result, expected) <= OUT
    assert error(weighted_sum_file.weighted_sum_reference(x, c, rows_and_tokens, 3), expected) <= OUT


def test_a_weighted_sum_of_nothing() -> None:
    result = weighted_sum_file.weighted_sum(random(2, 0, 8), random(2, 0, 3), None, 2)
    assert result.shape == (2, 3, 8) and not bool(result.any())


# ---- all of them


@pytest.mark.parametrize("norm", [False, True])
def test_activations_whose_columns_lie_apart(norm: bool) -> None:
    """As a transposed matrix has them; with the gradients, and the weights of sums."""
    h, pull, u = random(2, 33, 5).mT, random(2, 33, 5, seed=1).mT, random(33, 2, seed=2).mT
    assert h.stride(-1) == pull.stride(-1) == 5 and u.stride(-1) == 2
    for run in (
        lambda h, u: steer_add(h, u, 0.5, slots=torch.tensor([1, 0]), preserve_norm=norm),
        lambda h, u: edit(h, u, low=0.1, preserve_norm=norm),
    ):
        results = []
        for lie in (torch.Tensor.detach, torch.Tensor.contiguous):
            inputs = [lie(tensor).requires_grad_() for tensor in (h, u)]
            out = run(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs, lie(pull))))
        assert all(error(a, b) <= OUT for a, b in zip(*results, strict=True))
    for a, b in zip(drift_stats(h, u, bins=3), drift_stats(h.contiguous(), u, bins=3), strict=True):
        assert torch.equal(a, b)
    c = random(2, 3, 5, seed=3).mT
    assert torch.equal(*(weighted_sum_file.weighted_sum(x, y, None, 1) for x, y in ((h, c), (h.contiguous(), c.contiguous()))))


@pytest.mark.parametrize("which", ["rows", "tokens"])
def test_tokens_that_are_left_alone_hand_their_gradient_on_as_it_is(which: str) -> None:
    slots, h, pull = SLOTS[which], random(3, 5, 33).requires_grad_(), random(3, 5, 33, seed=1)
    alone = ((slots < 0) | (slots > 2)).view(3, -1).expand(3, 5)
    for run in (
        lambda: steer_add(h, random(3, 33, seed=2), 2.0, slots=slots, preserve_norm=True),
        lambda: edit(h, random(3, 1, 33, seed=2), low=0.5, slots=slots, preserve_norm=True),
    ):
        [result] = torch.autograd.grad(run(), h, pull)
        assert torch.equal(result[alone], pull[alone]) and not torch.equal(result[~alone], pull[~alone])


def test_the_division_of_a_sum_covers_all_tokens() -> None:
    for tokens in (1, 31, 33, 8192, 100_000):
        for vectors in (1, 16, 256):
            block, parts, steps = weighted_sum_file.divide_work(tokens, vectors, 4096)
            assert parts * steps * weighted_sum_file.TILE_SIZE >= tokens and (parts - 1) * steps * weighted_sum_file.TILE_SIZE < tokens
            assert steps & (steps - 1) == 0 and parts * vectors <= max(vectors, weighted_sum_file.MAX_PROGRAMS) and block == 256
