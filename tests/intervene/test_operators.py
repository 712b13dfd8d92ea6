"""Add and ablate against the formula written by hand, in every dtype, with gradients; strength 0 changes no bit."""

import copy

import pytest
import torch
from families import FAMILIES
from hand import edited, ids, packed, padded, vector
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import ConfigError, NonFiniteError
from steer.intervene import OPERATORS, Ablate, Add, Intervention, Plan
from steer.intervene.operator import Pick
from steer.model.anatomy import Anatomy

SITES = ["embed", "layers.1.input", "layers.1.output", "layers.0.attn.output", "layers.2.mlp.output", "final_norm"]


def operators() -> dict:
    rank = torch.stack([vector(seed=3), vector(seed=4), vector(seed=5)])
    return {"add": Add(vector()), "ablate one": Ablate(vector()), "ablate three": Ablate(rank)}


def formula(name: str, h: torch.Tensor, strength: float) -> torch.Tensor:
    """Written without the library."""
    if name == "add":
        return h + strength * vector().to(h.dtype)
    rows = vector()[None] if name == "ablate one" else torch.stack([vector(seed=seed) for seed in (3, 4, 5)])
    projector = torch.linalg.pinv(rows.double()) @ rows.double()
    return (h.double() - strength * h.double() @ projector).to(h.dtype)


def applied(operator, h, strength=1.0, mask=None):
    return operator.apply(h, torch.tensor([strength]).view(-1, 1, 1), mask, Pick(operator, None))


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plan_equals_hooks_written_by_hand(family, name, tiny):
    model = tiny(family)
    anatomy = Anatomy.find(model)
    for site in SITES:
        point = anatomy.point(site)
        with torch.no_grad():
            with Plan(Intervention(operators()[name], site, strength=0.7)).attached(model):
                steered = model(ids(), use_cache=False).logits
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(
                    lambda _, args, kwargs: ((formula(name, args[0], 0.7), *args[1:]), kwargs), with_kwargs=True
                )
                by_hand = model(ids(), use_cache=False).logits
                handle.remove()
            else:
                with edited(point.module, lambda h: formula(name, h, 0.7)):
                    by_hand = model(ids(), use_cache=False).logits
            plain = model(ids(), use_cache=False).logits
        # one part in a million of the largest logit, as far as fp32 itself carries through three blocks
        assert (steered - by_hand).abs().max() <= 1e-6 * max(1.0, float(by_hand.abs().max())) * 4, site
        assert (plain - by_hand).abs().max() > 1e-3, site


@given(st.integers(1, 5), st.integers(1, 40), st.floats(-3, 3), st.integers(0, 99))
def test_ablation_leaves_nothing_in_the_span_and_the_rest_alone(rank, width, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, width)
    rows = torch.randn(rank, width, generator=generator)
    if torch.linalg.svdvals(rows).min() < 1e-2:
        return
    operator = Ablate(rows)
    h = torch.randn(2, 3, width, generator=generator)
    once = applied(operator, h)
    unit = torch.linalg.qr(rows.mT).Q
    assert (once @ unit).abs().max() < 1e-4
    assert torch.allclose(once - once @ unit @ unit.mT, h - h @ unit @ unit.mT, atol=1e-4)
    assert torch.allclose(applied(operator, once), once, atol=1e-4)
    assert torch.allclose(applied(operator, h, strength), h + strength * (once - h), atol=1e-4)


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_against_finite_differences(name, masked):
    operator = operators()[name]
    h = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.float64)[..., None] if masked else None
    assert torch.autograd.gradcheck(lambda x: applied(operator, x, 0.7, mask), h)


@pytest.mark.parametrize("name", operators())
def test_a_masked_token_keeps_every_bit(name):
    h = torch.randn(2, 3, 32)
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]])[..., None]
    edited_ = applied(operators()[name], h, 0.7, mask)
    whole = applied(operators()[name], h, 0.7)
    assert torch.equal(edited_[0, 1], h[0, 1]) and torch.equal(edited_[1, 0], h[1, 0])
    assert torch.allclose(edited_[0, 0], whole[0, 0], atol=1e-6) and not torch.equal(edited_[0, 0], h[0, 0])


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_model_is_kept(name, dtype, tiny):
    model = tiny("llama").to(dtype)
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    one = Intervention(operators()[name], "layers.1.output", strength=0.7)
    with torch.no_grad(), Plan(one).attached(model):
        steered = model(ids()).logits
    with torch.no_grad(), edited(model.model.layers[1], lambda h: formula(name, h, 0.7)):
        by_hand = model(ids()).logits
    assert set(seen) == {dtype} and steered.dtype is dtype
    assert torch.allclose(steered, by_hand, rtol=0.05, atol={torch.float64: 1e-5}.get(dtype, 0.1))


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("site", ["layers.1.output", "layers.1.attn.output", "layers.1.mlp.output", "layers.1.attn.z"])
def test_autocast_keeps_its_residual_stream_in_fp32(name, site, tiny):
    """A model in fp32 under bf16 autocast: attention and MLP write bf16, the stream is fp32; an edit must not change either."""
    model = tiny("llama")
    found = {}
    for steered in (False, True):
        seen = found[steered] = []
        handles = [
            part.register_forward_hook(lambda _, __, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
            for part in (model.model.layers[1].self_attn, model.model.layers[1].mlp, model.model.layers[1], model.model.layers[2])
        ]
        plan = Plan(Intervention(operators()[name], site, strength=0.7))
        with torch.autocast("cpu", torch.bfloat16):
            if steered:
                with plan.attached(model):
                    model(ids(), labels=ids()).loss.backward()
            else:
                model(ids(), labels=ids()).loss.backward()
        for handle in handles:
            handle.remove()
    assert found[True] == found[False] and torch.float32 in found[True] and torch.bfloat16 in found[True]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def zero_plan(scope: str) -> Plan:
    ones = [Intervention(copy.deepcopy(op), f"layers.{i}.output", scope, strength=0.0) for i, op in enumerate(operators().values())]
    ones += [Intervention(Add(vector()), "layers.1.attn.output", scope, strength=0.0)]
    return Plan([*ones, Intervention(Ablate(vector()), "layers.1.mlp.output", scope, strength=3.0, enabled=False)])


@pytest.mark.parametrize("scope", ["all", "response", "last", "positions[0,-1]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit(scope, dtype, tiny):
    """In a forward pass, in generation and in a training step, where the weights after AdamW must be the same too."""
    found = []
    for steered in (False, True):
        model = tiny("llama").to(dtype)
        batch = padded("left")
        plan = zero_plan(scope)
        if steered:
            plan.attach(model)
        with torch.no_grad():
            forward = model(**batch).logits
        text = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for batch in (padded("right"), packed()):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        found.append([forward, text, *losses, *model.state_dict().values()])
        if steered:
            assert set(plan.fired().values()) == {0}
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_flow_through_to_the_blocks_before(tiny):
    model = tiny("llama")
    batch = padded("right")
    found = []
    for by_hand in (False, True):
        model.zero_grad()
        mask = (batch["labels"] != -100).unsqueeze(-1)
        if by_hand:
            with edited(model.model.layers[1], lambda h, mask=mask: torch.where(mask, formula("ablate one", h, 1.0), h)):
                model(**batch).loss.backward()
        else:
            with Plan(Intervention(Ablate(vector()), "layers.1.output", "response")).attached(model):
                model(**batch).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6) and found[0].abs().max() > 1e-4


def test_interventions_on_one_site_are_applied_in_order(tiny):
    model = tiny("llama")
    add, ablate = Intervention(Add(vector()), "layers.1.output"), Intervention(Ablate(vector()), "layers.1.output")
    with torch.no_grad():
        with edited(model.model.layers[1], lambda h: formula("ablate one", h, 1.0)):
            removed = model(ids()).logits
        for ones, wanted in (([add, ablate], True), ([ablate, add], False)):
            with Plan(ones).attached(model):
                assert torch.allclose(model(ids()).logits, removed, atol=1e-5) is wanted


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(8), torch.ones(2, 8), torch.randn(9, 8), torch.tensor([[1.0, 0], [1.0, 1e-9]])],
    ids=["zero", "twice", "too many", "near"],
)
def test_directions_that_span_nothing_are_refused(rows):
    with pytest.raises(ConfigError, match=r"linearly dependent[\s\S]*leave out"):
        Ablate(rows)


def test_bad_vectors_are_refused():
    for make in (Add, Ablate):
        with pytest.raises(NonFiniteError, match="2 of 4 entries"):
            make(torch.tensor([1.0, float("nan"), float("inf"), 0.0]))
        with pytest.raises(ConfigError, match="wrong shape"):
            make(torch.zeros(1, 1, 1, 4))
    with pytest.raises(ConfigError, match="wrong shape"):
        Add(torch.zeros(0))


def test_the_vector_is_a_copy():
    given_ = vector()
    operator = Add(given_)
    given_.zero_()
    assert operator.tensors["vector"].abs().sum() > 1


def test_the_registry_names_both():
    assert set(OPERATORS) == {"add", "ablate"}
    assert all(line for _, line in OPERATORS.table())
    with pytest.raises(ConfigError, match="did you mean 'ablate'"):
        OPERATORS.get("ablat")
