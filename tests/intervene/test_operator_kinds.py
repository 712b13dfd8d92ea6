"""What each operator promises beyond its formula, and the mistakes that it refuses."""

import math

import pytest
import torch
from hand import hook_count, ids, padded, recorded, vector
from hypothesis import given
from hypothesis import strategies as st
from intervene.operator_cases import CASES, applied, projection, reach

from steer.errors import ConfigError, SiteError, SteerError, WidthError
from steer.intervene import (
    Ablate,
    AblateThenAdd,
    Ace,
    Clamp,
    Erase,
    HeadShift,
    Intervention,
    KSteering,
    LoReFT,
    Mirror,
    Plan,
    ProbeGate,
    ReftR1,
    Replace,
    Rotate,
    Scale,
    TargetProjection,
)
from steer.model.watcher import watcher_of


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


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


def test_ablate_then_add_gives_every_token_the_same_amount():
    h, v = states(2, 5, 32), vector()
    for strength in (1.0, 1.7, -2.0):
        assert torch.allclose(reach(applied(AblateThenAdd(v), h, strength), v), strength * v.norm().expand(2, 5, 1), atol=1e-4)
    half = applied(AblateThenAdd(v), h, 0.5)  # half of what was there, and half of v
    assert torch.allclose(reach(half, v), (reach(h, v) + v.norm()) / 2, atol=1e-5)
    assert torch.allclose(applied(AblateThenAdd(v), h, 1e-6), h, atol=1e-4)  # without a jump at strength 0


def test_ace_goes_from_the_mean_without_to_the_mean_with_the_concept():
    without, with_it, h = vector(seed=3), vector(seed=4), states(2, 5, 32)
    r = with_it - without
    for alpha, mean in ((0.0, without), (1.0, with_it), (0.5, (without + with_it) / 2)):
        edited = applied(Ace(r, without, alpha), h)
        assert torch.allclose(reach(edited, r), reach(mean, r).expand(2, 5, 1), atol=1e-4)
        assert torch.allclose(edited - projection(edited, r), h - projection(h, r), atol=1e-5)
    ablated_only = applied(Ace(r, torch.zeros(32), 0.0), h)
    assert torch.allclose(ablated_only, applied(Ablate(r), h), atol=1e-5)


def test_erase_is_the_eraser_of_concept_erasure():
    package = pytest.importorskip("concept_erasure")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (400,), generator=generator)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = x + labels[:, None] * torch.randn(12, generator=generator, dtype=torch.float64) + 3
    eraser = package.LeaceEraser.fit(x, labels)
    operator = Erase(eraser.proj_left.mT, eraser.proj_right, eraser.bias)
    erased = applied(operator, x[None])[0]
    assert torch.allclose(erased, eraser(x), atol=1e-5)
    gap = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    left = erased[labels == 1].mean(0) - erased[labels == 0].mean(0)
    assert left.norm() < 1e-4 * gap.norm() and (x - erased).abs().max() > 0.1


def test_clamp_moves_only_what_is_outside():
    h, u = states(2, 40, 32), vector()
    p = reach(h, u)
    for operator, expected in (
        (Clamp(u, 0.7), torch.full_like(p, 0.7)),
        (Clamp(u, low=-0.5, high=0.5), p.clamp(-0.5, 0.5)),
        (Clamp(u, low=0.0), p.clamp(min=0)),
        (Clamp(u, high=-0.1), p.clamp(max=-0.1)),
    ):
        actual = applied(operator, h)
        assert torch.allclose(reach(actual, u), expected, atol=1e-5)
        inside = (expected == p).squeeze(-1)
        assert torch.equal(actual[inside], h[inside])
        assert torch.allclose(actual - projection(actual, u), h - projection(h, u), atol=1e-5)


def test_mirror_and_target_projection_leave_the_wanted_side_alone():
    h, u = states(2, 40, 32), vector()
    p = reach(h, u)
    below = (p < 0.3).squeeze(-1)
    assert 5 < below.sum() < 75
    mirrored, brought = applied(Mirror(u, 0.3), h), applied(TargetProjection(u, 1.5, threshold=0.3), h)
    assert torch.equal(mirrored[~below], h[~below]) and torch.equal(brought[~below], h[~below])
    assert torch.allclose(reach(mirrored, u)[below], (0.6 - p)[below], atol=1e-5)
    assert torch.allclose(reach(applied(Mirror(u, 0.3), h, 0.5), u)[below], torch.tensor(0.3), atol=1e-5)
    assert torch.allclose(reach(brought, u)[below], torch.tensor(1.5), atol=1e-5)
    assert torch.equal(applied(Mirror(u, 0.3), mirrored), mirrored)  # nobody is left on the wrong side
    assert torch.allclose(applied(TargetProjection(u, 1.5), h), applied(Clamp(u, low=1.5), h), atol=1e-6)


def test_scale_and_replace():
    h, a, b = states(2, 5, 32), vector(seed=3), vector(seed=4)
    assert torch.allclose(applied(Scale(a, 0.0), h), applied(Ablate(a), h), atol=1e-6)
    reflected = applied(Scale(a, -1.0), h)
    assert torch.allclose(reflected.norm(dim=-1), h.norm(dim=-1), atol=1e-5)
    assert torch.allclose(applied(Scale(a, -1.0), reflected), h, atol=1e-5)
    old, new = a.expand(1, 1, -1), b.expand(1, 1, -1)
    assert torch.allclose(applied(Replace(a, b), 3 * old), 3 * new, atol=1e-5)
    assert torch.allclose(applied(Replace(a, a), h), h, atol=1e-6)


# ---- rotation


@given(st.floats(-7, 7), st.floats(-2, 2), st.booleans(), st.integers(0, 20))
def test_rotation_keeps_every_norm(angle, strength, towards, seed):
    plane, h = states(2, 16, seed=seed), states(2, 3, 16, seed=seed + 1)
    turned = applied(Rotate(plane, angle, towards=towards), h, strength)
    assert torch.allclose(turned.norm(dim=-1), h.norm(dim=-1), rtol=1e-5)
    basis = torch.linalg.qr(plane.mT).Q
    assert torch.allclose((turned @ basis).norm(dim=-1), (h @ basis).norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.allclose(turned - turned @ basis @ basis.mT, h - h @ basis @ basis.mT, atol=1e-5)


def test_rotation_by_and_towards_an_angle():
    plane = torch.stack([vector(seed=3), vector(seed=4)])
    first, second = plane[0] / plane[0].norm(), plane[1] - projection(plane[1], plane[0])
    second = second / second.norm()
    quarter = math.pi / 2
    assert torch.allclose(applied(Rotate(plane, quarter), first[None, None] * 2), 2 * second, atol=1e-5)  # from the first to the second
    assert torch.allclose(applied(Rotate(plane, quarter), first[None, None], 2.0), -first, atol=1e-5)
    h = states(4, 10, 32)
    turned = applied(Rotate(plane, 2.0, towards=True), h)
    angles = torch.atan2(turned @ second, turned @ first)
    assert torch.allclose(angles, torch.tensor(2.0), atol=1e-4)
    before = torch.atan2(h @ second, h @ first)
    third = applied(Rotate(plane, 2.0, towards=True), h, 1 / 3)
    way = torch.atan2(torch.sin(2.0 - before), torch.cos(2.0 - before))  # the shorter one
    moved = torch.atan2(third @ second, third @ first) - before
    assert torch.allclose(torch.remainder(moved - way / 3 + 3, 2 * math.pi), torch.tensor(3.0), atol=1e-4)


def test_the_adaptive_variant_of_angular_steering_is_a_gate(tiny):
    model, plane = tiny("llama"), torch.stack([vector(seed=3), vector(seed=4)])
    gated = Intervention(Rotate(plane, 2.5, towards=True), "layers.1.output", gate=ProbeGate(plane[0]))
    with torch.no_grad(), recorded(model, ["layers.1.output"]) as plain:
        model(ids())
    with torch.no_grad(), Plan(gated).attached(model), recorded(model, ["layers.1.output"]) as turned:
        model(ids())
    h, actual = plain["layers.1.output"], turned["layers.1.output"]
    aligned = h @ plane[0] > 0
    assert 0 < aligned.sum() < aligned.numel()
    expected = torch.where(aligned.unsqueeze(-1), applied(Rotate(plane, 2.5, towards=True), h), h)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_a_token_without_a_part_in_the_plane_has_gradients():
    h = torch.zeros(1, 2, 32, requires_grad=True)
    applied(Rotate(torch.stack([vector(seed=3), vector(seed=4)]), 1.0, towards=True), h).sum().backward()
    assert torch.isfinite(h.grad).all()


# ---- heads


@pytest.mark.parametrize("site", ["layers.1.output", "layers.1.attn.output", "layers.1.attn.v", "embed"])
def test_heads_are_shifted_where_there_are_heads(site):
    with pytest.raises(SiteError, match=r"no heads to shift[\s\S]*attn\.z"):
        Intervention(HeadShift(states(1, 8), [0], 4), site)


@pytest.mark.parametrize(("width", "heads"), [(4, 8), (16, 2)])
def test_the_heads_are_those_of_the_model(width, heads, tiny):
    """With 4 heads of 8 channels, a shift for 8 heads would move half of a head."""
    model = tiny("llama")
    plan = Plan(Intervention(HeadShift(states(1, width), [0], heads), "layers.1.attn.z"))
    with pytest.raises(ConfigError, match=rf"4 heads of 8 channels[\s\S]*{heads} heads of {width}"):
        plan.attach(model)
    assert hook_count(model) == 0 and watcher_of(model) is None


# ---- probes and detection


def test_k_steering_raises_what_it_is_for():
    """Uses a probe of three labels: steers towards label 0 and away from label 2."""
    w1, b1, w2 = states(16, 32, seed=1) * 0.3, states(16, seed=2), states(3, 16, seed=3)
    h = states(2, 20, 32)

    def logits(x):
        return torch.relu(x @ w1.T + b1) @ w2.T

    def objective(x):
        return (logits(x)[..., 0] - logits(x)[..., 2]).mean()

    single, five = (applied(KSteering([w1, w2], [b1], [0], [2], steps=steps, decay=0.8), h, 0.1) for steps in (1, 5))
    assert objective(five) > objective(single) + 0.5 > objective(h) + 1.0
    back = applied(KSteering([w1, w2], [b1], [0], [2]), h, -0.1)
    assert objective(back) < objective(h) - 0.5
    alone = applied(KSteering([w1, w2], [b1], [0], [2], steps=5, decay=0.8), h[:1, :1], 0.1)
    assert torch.allclose(five[:1, :1], alone, atol=1e-5)  # the step of a token does not depend on how many others there are


def test_reft_r1_looks_at_the_tokens_it_acts_on():
    w, h = vector(), states(2, 6, 32)
    operator, detected = ReftR1(w, k=2), torch.relu(reach(h, w).squeeze(-1))
    assert torch.allclose(operator.detect(h), detected, atol=1e-5)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.float32)
    edited = applied(operator, h, 1.0, mask.unsqueeze(-1))
    level = torch.stack([detected[0][mask[0] == 1].sort().values[-2:].mean(), detected[1, 3]])
    expected = h + mask.unsqueeze(-1) * level[:, None, None] * w / w.norm()
    assert torch.allclose(edited, expected, atol=1e-5)
    assert torch.equal(applied(operator, h, 1.0, torch.zeros(2, 6, 1)), h)  # no token, no level
    averaged = applied(ReftR1(w, k=50), h)  # more than there are
    assert torch.allclose(averaged, h + detected.mean(1)[:, None, None] * w / w.norm(), atol=1e-5)


def test_reft_r1_does_not_see_what_padding_holds():
    """A NaN on a token that is left out reaches neither the other tokens nor what is learned."""
    h = states(2, 4, 32)
    mask = torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1]]).unsqueeze(-1)
    operator = ReftR1(vector(), k=2).train()
    expected = applied(operator, h, 1.0, mask)
    expected[mask.expand_as(h) != 0].sum().backward()
    gradient = operator.parameters["vector"].grad.clone()
    h[0, 0], operator.parameters["vector"].grad = float("nan"), None
    actual = applied(operator, h, 1.0, mask)
    actual[mask.expand_as(h) != 0].sum().backward()
    assert torch.isnan(actual[0, 0]).all() and torch.equal(actual[0, 1:], expected[0, 1:]) and torch.equal(actual[1], expected[1])
    assert gradient.any() and torch.equal(operator.parameters["vector"].grad, gradient)


def test_reft_r1_does_not_see_padding(tiny):
    """The level of a row is the level of its text."""
    model = tiny("llama")
    batch = padded("left")
    plan = Plan(Intervention(ReftR1(vector(), k=2), "layers.1.output", strength=3.0))
    with torch.no_grad(), plan.attached(model):
        together = model(**batch).logits
        for row in range(3):
            real = batch["attention_mask"][row].bool()
            alone = model(batch["input_ids"][row : row + 1, real], use_cache=False).logits[0]
            assert torch.allclose(together[row, real], alone, atol=1e-4)


# ---- the real model


@pytest.mark.real
def test_projections_of_a_real_model_are_what_was_asked_for(smollm2):
    """Its residual stream has entries of several hundred beside a projection of 1, in fp32 and in bf16."""
    model, tokenizer = smollm2
    text = tokenizer("The museum opens at nine o'clock in the morning", return_tensors="pt")
    v = vector(576)
    site = "layers.15.output"
    with torch.no_grad(), recorded(model, [site]) as seen:
        model(**text)
    h = seen[site]
    assert h.abs().max() > 100
    for operator, expected in (
        (AblateThenAdd(v), float(v.norm())),
        (Clamp(v, 3.0), 3.0),
        (Ace(v, h.mean((0, 1)), 0.0), float(reach(h.mean((0, 1)), v))),
    ):
        assert torch.allclose(reach(applied(operator, h), v), torch.tensor(expected), atol=2e-3), operator.name
        rounded = applied(operator, h.bfloat16())
        exact = applied(operator, h.bfloat16().double())
        assert ((rounded - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all(), operator.name


# ---- mistakes


VECTOR = torch.ones(8)
MISTAKES = {
    "ablate zero": (lambda: Ablate(torch.zeros(8)), ConfigError, r"linearly dependent[\s\S]*leave out"),
    "ablate twice the same": (lambda: Ablate(torch.ones(2, 8)), ConfigError, r"linearly dependent[\s\S]*leave out"),
    "ablate too many": (lambda: Ablate(torch.randn(9, 8)), ConfigError, r"linearly dependent[\s\S]*leave out"),
    "ablate nearly the same": (lambda: Ablate(torch.tensor([[1.0, 0], [1.0, 1e-9]])), ConfigError, r"linearly dependent[\s\S]*leave out"),
    "add nothing": (lambda: AblateThenAdd(torch.zeros(8)), ConfigError, "is zero"),
    "one slot of zeros": (lambda: Scale(torch.stack([VECTOR, 0 * VECTOR]), 2.0), ConfigError, "is zero"),
    "reference of another width": (lambda: Ace(VECTOR, torch.ones(9), 0.0), WidthError, r"8 in vector, 9 in reference"),
    "slots that differ": (
        lambda: Ace(torch.ones(2, 8), torch.ones(3, 8), 0.0),
        ConfigError,
        r"row slots[\s\S]*2 in vector, 3 in reference",
    ),
    "numbers of other slots": (lambda: Scale(torch.ones(2, 8), torch.ones(3)), ConfigError, r"row slots[\s\S]*2 in direction, 3 in factor"),
    "a table of numbers": (lambda: Scale(VECTOR, torch.ones(2, 2)), ConfigError, "factor has the wrong shape"),
    "clamp to nothing": (lambda: Clamp(VECTOR), ConfigError, "a value or a range"),
    "clamp to both": (lambda: Clamp(VECTOR, 1.0, low=0.0), ConfigError, "a value or a range"),
    "clamp to an empty range": (lambda: Clamp(VECTOR, low=1.0, high=0.0), ConfigError, "empty"),
    "erase with half of a fit": (lambda: Erase(torch.ones(2, 8), torch.ones(1, 8), VECTOR), ConfigError, "2 and 1"),
    "erase transposed": (lambda: Erase(torch.ones(8, 1), torch.ones(1, 8), VECTOR), WidthError, "1 in left"),
    "a head too many": (lambda: HeadShift(torch.ones(2, 4), [0], 4), ConfigError, "2 different heads"),
    "a head twice": (lambda: HeadShift(torch.ones(2, 4), [1, 1], 4), ConfigError, "2 different heads"),
    "a head that is not there": (lambda: HeadShift(torch.ones(1, 4), [4], 4), ConfigError, "from 0 to 3"),
    "a linear probe": (lambda: KSteering([torch.ones(3, 8)], [], [0]), ConfigError, "hidden layer"),
    "a bias too many": (
        lambda: KSteering([torch.ones(5, 8), torch.ones(3, 5)], [torch.ones(5), torch.ones(3)], [0]),
        ConfigError,
        "one bias fewer",
    ),
    "layers that do not fit": (
        lambda: KSteering([torch.ones(5, 8), torch.ones(3, 6)], [torch.ones(5)], [0]),
        WidthError,
        r"layer 1[\s\S]*\[3, 5\]",
    ),
    "no label": (lambda: KSteering([torch.ones(5, 8), torch.ones(3, 5)], [torch.ones(5)], []), ConfigError, "no labels"),
    "an unknown label": (lambda: KSteering([torch.ones(5, 8), torch.ones(3, 5)], [torch.ones(5)], [3]), ConfigError, "0 to 2"),
    "no step": (lambda: KSteering([torch.ones(5, 8), torch.ones(3, 5)], [torch.ones(5)], [0], steps=0), ConfigError, "1 or more"),
    "ranks that differ": (lambda: LoReFT(torch.eye(2, 8), torch.ones(2, 8), torch.zeros(3)), ConfigError, "ranks"),
    "widths that differ": (lambda: LoReFT(torch.eye(2, 8), torch.ones(2, 9), torch.zeros(2)), WidthError, "9 in weight"),
    "detection of no token": (lambda: ReftR1(VECTOR, k=0), ConfigError, "1 or more"),
    "a target of another width": (lambda: Replace(VECTOR, torch.ones(9)), WidthError, "9 in target"),
    "a plane of one vector": (lambda: Rotate(torch.ones(1, 8), 1.0), ConfigError, "needs a plane"),
    "a plane of two equal vectors": (lambda: Rotate(torch.ones(2, 8), 1.0), ConfigError, "linearly dependent"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    make, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words) as caught:
        make()
    error: SteerError = caught.value
    assert error.what and error.expected and error.found is not None and error.remedy


def test_only_learned_operators_can_be_trained():
    for case in CASES.values():
        operator = case.make()
        if operator.learnable:
            assert set(operator.train().parameters) == set(operator.learnable)
        else:
            with pytest.raises(ConfigError, match="nothing to learn"):
                operator.train()
