"""`preserve_norm`, a modifier of every operator: what it keeps, in which dtype, and that it keeps every bit where nothing is edited."""

import pytest
import torch
from hand import active, edited, ids, packed, padded, vector
from intervene.operator_cases import CASES

from steer.intervene import Add, Intervention, Plan, ProbeGate
from steer.intervene.active import ActiveIntervention
from steer.model.context_builder import build_context

SITE = "layers.1.output"
HALF = [torch.bfloat16, torch.float16]


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def intervention(operator, strength=1.0, **options) -> Intervention:
    site = "layers.1.attn.z" if operator.name == "head_shift" else SITE
    return Intervention(operator, site, **{"strength": strength, "preserve_norm": True, **options})


def called(intervention: Intervention | ActiveIntervention, h: torch.Tensor, **inputs) -> torch.Tensor:
    acting = intervention if isinstance(intervention, ActiveIntervention) else active(intervention)
    return acting(h, build_context({"input_ids": torch.ones(h.shape[:2], dtype=torch.long), **inputs}, None))


@pytest.mark.parametrize("name", CASES)
def test_the_edit_scaled_back_to_the_norm_before_it(name):
    h = states(2, 5, 32)
    expected = CASES[name].expected(h, 0.7)
    expected = expected * (h.double().norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True))
    actual = called(intervention(CASES[name].make(), 0.7), h)
    assert torch.allclose(actual.double(), expected, atol=1e-5)
    assert torch.allclose(actual.norm(dim=-1), h.norm(dim=-1), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_ten_thousand_in_half_precision(name, dtype):
    """In fp16 the square of such a norm overflows, and so do some intermediate results; no final result does."""
    unit = states(2, 5, 32)
    h = (1e4 * unit / unit.norm(dim=-1, keepdim=True)).to(dtype)
    edited = called(intervention(CASES[name].make(), 40.0 if name == "add" else 0.7), h)
    assert edited.dtype is dtype and torch.isfinite(edited).all()
    step = torch.finfo(dtype).eps
    assert torch.allclose(edited.double().norm(dim=-1), h.double().norm(dim=-1), rtol=step)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_an_edit_beyond_the_largest_number_of_fp16_comes_back(dtype):
    h = torch.full((1, 2, 4), 3e4).to(dtype)
    edited = called(Intervention(Add(torch.tensor([3e4, 3e4, -3e4, -3e4])), SITE, strength=2.0, preserve_norm=True), h)
    expected = torch.tensor([3.0, 3.0, -1.0, -1.0], dtype=torch.float64)
    expected = expected / expected.norm() * h[0, 0].double().norm()
    assert torch.isfinite(edited).all() and torch.allclose(edited[0, 0].double(), expected, rtol=torch.finfo(dtype).eps * 2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_zero_and_closed_gates_keep_every_bit(name, dtype):
    h = (30 * states(3, 7, 32)).to(dtype)
    h[0, 2] = 0.0
    assert torch.equal(called(intervention(CASES[name].make(), 0.0), h), h)
    batch = padded("right")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    edited = called(intervention(CASES[name].make(), 0.7, scope="response"), h, **inputs)
    meant = batch["labels"] != -100
    assert torch.equal(edited[~meant], h[~meant]) and not torch.equal(edited[meant], h[meant])


def test_rows_of_strength_zero_keep_every_bit():
    h = (30 * states(3, 7, 32)).to(torch.bfloat16)
    acting = active(intervention(Add(vector()), [0.0, 1.0]))
    acting.rows = torch.tensor([0, 1, 0])
    edited = called(acting, h)
    assert torch.equal(edited[[0, 2]], h[[0, 2]]) and not torch.equal(edited[1], h[1])


def test_zero_vectors():
    """A token of zeros stays one, and an edit that ends in zeros cannot be scaled back: neither becomes NaN, nor do gradients."""
    v = vector()
    h = torch.stack([torch.zeros(32), v, -v, 2 * v])[None].requires_grad_()
    operator = Add(v).train()
    edited = called(intervention(operator), h)
    assert torch.equal(edited[0, :3].detach(), torch.stack([torch.zeros(32), v, torch.zeros(32)])) and edited[0, 3].allclose(2 * v)
    edited.square().sum().backward()
    assert torch.isfinite(h.grad).all() and torch.isfinite(operator.tensors["vector"].grad).all()
    still = called(intervention(Add(torch.zeros(32))), h)
    assert torch.equal(still, h)


@pytest.mark.parametrize("name", ["add", "ablate a span", "rotate towards", "loreft"])
def test_gradients_against_finite_differences(name):
    acting = intervention(CASES[name].make(), 0.7, scope="response", gate=None)
    h = states(1, 12, 32).double().requires_grad_()
    inputs = packed((4, 3, 5), prompt=1)
    assert torch.autograd.gradcheck(lambda x: called(acting, x, **inputs), h)


def test_gradients_of_tokens_that_are_left_alone_are_exact():
    h, batch = states(3, 7, 32).requires_grad_(), padded("right")
    weights = states(3, 7, 32, seed=1)
    (called(intervention(Add(vector()), scope="response"), h, **batch) * weights).sum().backward()
    left = batch["labels"] == -100
    assert torch.equal(h.grad[left], weights[left]) and not torch.allclose(h.grad[~left], weights[~left])


def test_a_vector_of_zero_learns_only_across_the_activation():
    """A vector of zeros has a gradient from the start, without the part along the activation, where the norm is fixed."""
    h, operator = states(1, 1, 32), Add(torch.zeros(32)).train()
    weights = states(1, 1, 32, seed=1)
    (called(intervention(operator), h) * weights).sum().backward()
    u = h[0, 0] / h.norm()
    assert torch.allclose(operator.tensors["vector"].grad[0], weights[0, 0] - (weights[0, 0] @ u) * u, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_a_model_with_a_gate_between_open_and_closed(dtype, tiny):
    model, x = tiny("llama").to(dtype), ids()
    soft = ProbeGate(torch.zeros(32), 1.0, sharpness=0.5)
    plan = Plan([Intervention(Add(vector()), SITE, gate=soft, preserve_norm=True), Intervention(Add(vector(seed=2)), SITE)])
    share = torch.sigmoid(torch.tensor(0.5))

    def edit(h):
        new = h.double() + share * vector()
        return (new * h.double().norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)).to(h.dtype) + vector(seed=2).to(h.dtype)

    with torch.no_grad():
        with plan.attached(model):
            actual = model(x).logits
        with edited(model.model.layers[1], edit):
            expected = model(x).logits
    assert actual.dtype is dtype and torch.allclose(actual, expected, atol=0.1 if dtype is torch.bfloat16 else 1e-5)


def test_training_with_strength_zero_is_that_of_the_bare_model(tiny):
    runs = []
    for steered in (False, True):
        model = tiny("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        plan = Plan([intervention(Add(vector()), 0.0), intervention(Add(vector()), 1.0, scope="positions[50]")])
        if steered:
            plan.attach(model)
        for batch in (padded("right"), packed()):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
