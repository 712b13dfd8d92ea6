"""Operators as kernels run them: the same formulas, also with masks, row slots and kept norms; and who asks for kernels."""

from __future__ import annotations

import pytest
import torch
from hand import active, ids, vector
from intervene.operator_cases import CASES
from torch import Tensor

from steer import kernels
from steer.intervene import Ablate, Add, Clamp, HeadShift, Intervention, LoReFT, Plan, Scale
from steer.intervene.active import edited_without_kernel
from steer.intervene.operator import Operator, tensors_of_rows

WITHOUT = {"k_steering", "k_steering, deep", "reft_r1", "rotate", "rotate towards"}  # no kernel does what they do
WITHOUT |= {
    name for name in CASES if "_features" in name or "_components" in name or name.startswith(("feature_gains", "feature_adapter", "bound"))
}


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def fused(operator: Operator, h: Tensor, strength: Tensor, mask: Tensor | None, rows: Tensor | None, norm: bool) -> Tensor | None:
    with kernels.force("op"):
        return operator.fused(h, strength, mask, rows, norm)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_in_a_kernel_is_its_formula(name: str, norm: bool) -> None:
    case, h, mask = CASES[name], states(2, 3, 32), torch.tensor([[1, 0, 0.5], [1, 1, 0]])[..., None]
    for strength in (0.0, 0.7, -1.3):
        actual = fused(case.make(), h, torch.full((1, 1, 1), strength), mask, None, norm)
        if actual is None:
            assert name in WITHOUT or (name in ("add", "add_decoder") and not norm) or (name == "head_shift" and not norm)
            return
        expected = h + mask * (case.expected(h, strength) - h)
        if norm:
            expected = expected * (h.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True))
        assert torch.allclose(actual.double(), expected, atol=2e-5) and torch.equal(actual[mask[..., 0] == 0], h[mask[..., 0] == 0])
        assert strength or torch.equal(actual, h)
    assert name not in WITHOUT


@pytest.mark.parametrize("name", sorted(set(CASES) - WITHOUT))
def test_rows_have_their_own_slots(name: str) -> None:
    case, h, rows = CASES[name], states(3, 2, 32), torch.tensor([1, 0, 1])
    operator = case.make((0, 1))
    actual = fused(operator, h, torch.full((1, 1, 1), 0.8), None, rows, False)
    assert actual is not None
    for row, slot in enumerate(rows.tolist()):
        assert torch.allclose(actual[row].double(), case.expected(h[row : row + 1], 0.8, seed=slot)[0], atol=2e-5)


@pytest.mark.parametrize("operator", [Add(vector()), Ablate(vector()), Clamp(vector(), low=0.1)], ids=lambda operator: operator.name)
@pytest.mark.parametrize("norm", [False, True])
def test_strengths_of_rows_and_one_vector_for_all(operator: Operator, norm: bool) -> None:
    """Only the strengths have several slots; the vector has one slot, which all rows use."""
    h, rows = states(3, 2, 32), torch.tensor([2, 0, 1])
    strengths = torch.tensor([0.0, 1.0, -0.5])[rows].view(-1, 1, 1)
    actual = fused(operator, h, strengths, None, rows, norm)
    expected = operator.apply(h, strengths, None, tensors_of_rows(operator.tensors, rows))
    if norm:
        expected = expected * (h.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True))
    assert actual is None if operator.name == "add" and not norm else torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["add", "scale", "loreft"])
def test_what_is_learned_gets_its_gradient(name: str) -> None:
    h, pull = states(2, 3, 32), states(2, 3, 32).flip(0)
    operators = {
        "add": lambda: Add(torch.stack([vector(), vector(seed=2)])),
        "scale": lambda: Scale(vector(), torch.tensor([2.0, 0.5])),
        "loreft": lambda: LoReFT.initial(32, rank=2),
    }
    results = []
    for path in ("op", "aten"):
        operator, strength = operators[name]().train(), torch.full((1, 1, 1), 0.6)
        rows = torch.tensor([1, 0]) if operator.slots > 1 else None
        with kernels.force(path):
            out = operator.fused(h, strength, None, rows, True)
            if path == "aten":
                out = edited_without_kernel(active(Intervention(operator, "layers.0.output", preserve_norm=True)), h, strength, None, rows)
        assert out is not None
        results.append([out, *torch.autograd.grad((out * pull).sum(), list(operator.parameters.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_learned_shifts_of_heads_stay_on_their_heads() -> None:
    """A kernel would move the others too."""
    operator = HeadShift(states(2, 8), [3, 1], 4)
    assert fused(operator, states(2, 3, 32), torch.ones(1, 1, 1), None, None, True) is not None
    assert fused(operator.train(), states(2, 3, 32), torch.ones(1, 1, 1), None, None, True) is None


def plan(preserve_norm: bool = True) -> Plan:
    interventions = [
        Intervention(Add(vector()), "layers.0.output", "positions[1:]", 3.0, preserve_norm=preserve_norm),
        Intervention(Ablate(torch.stack([vector(seed=3), vector(seed=4)])), "layers.1.attn.output", preserve_norm=preserve_norm),
        Intervention(Clamp(vector(seed=5), 0.5), "layers.1.output", "last"),
    ]
    return Plan(interventions)


def test_a_plan_asks_for_kernels_where_they_run(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code and on a GPU; on a CPU its own operations cost less of the host's time."""
    model, asked, results = tiny("llama"), [], {}
    for name in ("steer_add", "edit"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, real=real, name=name, **options: asked.append(name) or real(*args, **options))
    with torch.no_grad(), plan().attached(model):
        for path, names in (("auto", []), ("op", ["steer_add", "edit", "edit"])):
            asked.clear()
            with kernels.force(path):
                results[path] = model(ids()).logits
            assert asked == names
    assert torch.allclose(results["auto"], results["op"], atol=1e-5)


def test_compiled_and_eager_plans_agree(tiny) -> None:
    torch._dynamo.reset()
    for preserve_norm in (False, True):
        model = tiny("llama")
        with torch.no_grad(), plan(preserve_norm).attached(model):
            eager = model(ids(), use_cache=False).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)(ids(), use_cache=False).logits
        assert torch.allclose(compiled, eager, atol=1e-5)
    torch._dynamo.reset()
