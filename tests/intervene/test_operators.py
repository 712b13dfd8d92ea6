"""Every operator: its formula, no bit changed at strength or mask 0, gradients, row slots, dtypes, files, typed errors."""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, HEADS
from hand import edited, ids, packed, padded, vector
from intervene.operator_cases import CASES, applied
from method_tables import check_table

from steer.errors import ConfigError, NonFiniteError, WidthError
from steer.intervene import OPERATORS, Ablate, Add, Clamp, Intervention, Plan
from steer.model.anatomy import Anatomy

SITES = ["embed", "layers.1.input", "layers.1.output", "layers.0.attn.output", "layers.2.mlp.output", "final_norm", "layers.1.attn.z"]


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype)


def site_of(name: str, number: int = 2) -> str:
    return "layers.1.attn.z" if name == "head_shift" else SITES[number % len(SITES)]


def every(site: str | None = None, **options) -> list[Intervention]:
    """All cases on one site, or on one each."""
    return [
        Intervention(case.make(), site if site and name != "head_shift" else site_of(name), name=name, **options)
        for name, case in CASES.items()
    ]


def test_every_operator_has_a_case_and_a_line():
    check_table(
        OPERATORS,
        {case.make().name for case in CASES.values()},
        "CASES of tests/intervene/operator_cases.py",
        "how to build the operator, and its formula in fp64 written in another way",
    )
    assert all(line for _, line in OPERATORS.table())
    with pytest.raises(ConfigError, match="did you mean 'ablate'"):
        OPERATORS.get("ablat")


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    case, h = CASES[name], states(3, 4, 32)
    share = torch.tensor([1.0, 0.25, 0.5, 1.0]).view(1, 4, 1)
    for strength in (1.0, 0.6, -1.7):
        expected = case.expected(h, strength)
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-6)):  # vectors are kept in fp32
            actual = applied(case.make(), h.to(dtype), strength)
            assert actual.dtype is dtype and actual.shape == h.shape
            assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
            part = applied(case.make(), h.to(dtype), strength, share.to(dtype))
            assert (part - (h + share * (expected - h))).abs().max() <= tolerance * expected.abs().max()
    assert (case.expected(h) - h).abs().max() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_affine_operators_say_so(name):
    """An affine map takes the middle of two activations to the middle of what it makes of them."""
    operator, a, b = CASES[name].make(), 3 * states(4, 20, 32, seed=1), 3 * states(4, 20, 32, seed=2)
    middle = (applied(operator, a, 0.7) + applied(operator, b, 0.7)) / 2
    assert operator.is_affine() is bool((applied(operator, (a + b) / 2, 0.7) - middle).abs().max() < 1e-4)


def test_every_operator_is_in_the_docs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(rows) == sorted({case.make().name for case in CASES.values()})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plan_equals_hooks_written_by_hand(family, tiny):
    model = tiny(family)
    anatomy = Anatomy.find(model)
    unmoved = set()
    with torch.no_grad():
        plain = model(ids(), use_cache=False).logits
        for number, (name, case) in enumerate(CASES.items(), sorted(FAMILIES).index(family)):
            point = anatomy.point(site_of(name, number))
            assert point.width is not None and anatomy.n_heads == HEADS

            def edit(h, case=case):
                return case.expected(h.view(len(ids()), -1, h.shape[-1]), 0.7).view_as(h).to(h.dtype)  # the MLP of OPT sees [tokens, width]

            with Plan(Intervention(case.make(width=point.width), point.site, strength=0.7)).attached(model):
                steered = model(ids(), use_cache=False).logits
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(
                    lambda _, args, kwargs, edit=edit: ((edit(args[0]), *args[1:]), kwargs), with_kwargs=True
                )
                by_hand = model(ids(), use_cache=False).logits
                handle.remove()
            else:
                with edited(point.module, edit):
                    by_hand = model(ids(), use_cache=False).logits
            # a few parts in a million of the largest logit, as far as fp32 itself carries through three blocks
            assert (steered - by_hand).abs().max() <= 1e-5 * max(1.0, float(by_hand.abs().max())), (name, str(point.site))
            unmoved |= {name} if (plain - by_hand).abs().max() < 1e-4 else set()
    out_of_bounds = {"clamp to a range", "clamp from below", "mirror", "target_projection", "reft_r1"}  # no token may be
    assert unmoved <= out_of_bounds | {"clamp_features by a factor, top-k", "ablate_features"}  # no feature may be on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_strength_and_mask_zero_keep_every_bit(name, dtype):
    operator, h = CASES[name].make(), states(2, 9, 32, dtype=dtype)
    assert torch.equal(applied(operator, h, 0.0), h)
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1]]).repeat(1, 3).unsqueeze(-1).to(dtype)
    actual = applied(operator, h, 2.0, mask)
    left_alone = mask.squeeze(-1) == 0
    assert torch.equal(actual[left_alone], h[left_alone]) and not torch.equal(actual, h)
    assert torch.equal(applied(operator, h, 2.0, mask * 0), h)


@pytest.mark.parametrize("name", CASES)
def test_gradients_against_finite_differences(name):
    operator = CASES[name].make(width=8)
    if operator.learnable:
        operator.train()
        operator.tensors = {
            key: torch.nn.Parameter(tensor.double()) if key in operator.learnable else tensor for key, tensor in operator.tensors.items()
        }
    learned = list(operator.parameters.values())
    h = states(2, 3, 8, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1.0, 0, 0.5], [0, 1, 1]], dtype=torch.float64).unsqueeze(-1)
    for used in (None, mask):
        checked = (h, *learned) if name != "head_shift" else (h,)  # which keeps some of its gradient at 0
        assert torch.autograd.gradcheck(lambda x, *_, used=used: applied(operator, x, 0.7, used), checked)
    weights = states(2, 3, 8, seed=1, dtype=torch.float64)
    for gradient in torch.autograd.grad((applied(operator, h) * weights).sum(), [h, *learned]):
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_row_slots_equal_single_runs(name):
    """Every row with its own tensors and strength; and one set of tensors with a strength each."""
    case, h, rows, strengths = CASES[name], states(4, 3, 32), [2, 0, 1, 2], [0.5, -1.2, 2.0]
    shared = case.make()
    together = applied(case.make(seeds=(0, 1, 2)), h, strengths, rows=rows)
    # products of one row and of several round in another order on some processors, by the size of their largest entries
    rounding = max(1e-5, 1e-6 * float(together.abs().max()))
    for row, slot in enumerate(rows):
        own = case.make(seeds=(slot,)) if "k_steering" not in name else shared  # a probe is shared, its labels need not be
        assert torch.allclose(together[row : row + 1], applied(own, h[row : row + 1], strengths[slot]), atol=rounding)
    dosed = applied(shared, h, strengths, rows=rows)
    for row, slot in enumerate(rows):
        assert torch.allclose(dosed[row : row + 1], applied(shared, h[row : row + 1], strengths[slot]), atol=rounding)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_rounds_once(name):
    """Language models have entries of 5000: beside them, coordinates in bf16 would be wrong by more than 1."""
    case = CASES[name]
    for dtype, digits in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        h = states(2, 3, 32)
        h[..., 5] += 5000
        h = h.to(dtype)
        actual, expected = applied(case.make(), h, 0.7), case.expected(h, 0.7)
        assert actual.dtype is dtype
        assert ((actual.double() - expected).abs() <= digits * expected.abs() + 0.01).all()


@pytest.mark.parametrize("name", ["add", "ablate a span", "k_steering", "loreft", "rotate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_model_is_kept(name, dtype, tiny):
    model, case = tiny("llama").to(dtype), CASES[name]
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), Plan(Intervention(case.make(), "layers.1.output", strength=0.7)).attached(model):
        steered = model(ids()).logits
    with torch.no_grad(), edited(model.model.layers[1], lambda h: case.expected(h, 0.7).to(h.dtype)):
        by_hand = model(ids()).logits
    assert set(seen) == {dtype} and steered.dtype is dtype
    assert torch.allclose(steered, by_hand, rtol=0.05, atol={torch.float64: 1e-5}.get(dtype, 0.1))


@pytest.mark.parametrize("site", ["layers.1.output", "layers.1.attn.output", "layers.1.mlp.output", "layers.1.attn.z"])
def test_autocast_keeps_its_residual_stream_in_fp32(site, tiny):
    """A model in fp32 under bf16 autocast: attention and MLP write bf16, the stream is fp32; an edit must not change either."""
    model = tiny("llama")
    dtypes = {}
    for steered in (False, True):
        seen = dtypes[steered] = []
        handles = [
            part.register_forward_hook(lambda _, __, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
            for part in (model.model.layers[1].self_attn, model.model.layers[1].mlp, model.model.layers[1], model.model.layers[2])
        ]
        with torch.autocast("cpu", torch.bfloat16):
            if steered:
                with Plan(every(site, strength=0.1)).attached(model):
                    model(ids(), labels=ids()).loss.backward()
            else:
                model(ids(), labels=ids()).loss.backward()
        for handle in handles:
            handle.remove()
    assert dtypes[True] == dtypes[False] and torch.float32 in dtypes[True] and torch.bfloat16 in dtypes[True]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_products_under_autocast_are_those_of_fp32():
    for name, case in CASES.items():
        h = states(2, 3, 32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = applied(case.make(), h, 0.7)
        assert torch.equal(inside, applied(case.make(), h, 0.7)), name


@pytest.mark.parametrize("scope", ["all", "response", "last", "positions[0,-1]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit_of_a_model(scope, dtype, tiny):
    """Covers a forward pass, generation and a training step, after which the AdamW weights must be equal too."""
    runs = []
    for steered in (False, True):
        model = tiny("llama").to(dtype)
        batch = padded("left")
        off = Intervention(Ablate(vector()), "layers.1.mlp.output", scope, strength=3.0, enabled=False)
        plan = Plan([*every(scope=scope, strength=0.0), off])
        if steered:
            attachment = plan.attach(model)
        with torch.no_grad():
            forward = model(**batch).logits
        text = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for batch in (padded("right"), packed()):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        runs.append([forward, text, *losses, *model.state_dict().values()])
        if steered:
            assert set(attachment.fired().values()) == {0}
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_flow_through_to_the_blocks_before(tiny):
    model, case = tiny("llama"), CASES["ablate"]
    batch = padded("right")
    gradients = []
    for by_hand in (False, True):
        model.zero_grad()
        mask = (batch["labels"] != -100).unsqueeze(-1)
        if by_hand:
            with edited(model.model.layers[1], lambda h, mask=mask: torch.where(mask, case.expected(h).to(h.dtype), h)):
                model(**batch).loss.backward()
        else:
            with Plan(Intervention(case.make(), "layers.1.output", "response")).attached(model):
                model(**batch).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-4


def test_interventions_on_one_site_are_applied_in_order(tiny):
    model = tiny("llama")
    add, ablate = Intervention(CASES["add"].make(), "layers.1.output"), Intervention(CASES["ablate"].make(), "layers.1.output")
    with torch.no_grad():
        with edited(model.model.layers[1], lambda h: CASES["ablate"].expected(h).to(h.dtype)):
            removed = model(ids()).logits
        for interventions, equal in (([add, ablate], True), ([ablate, add], False)):
            with Plan(interventions).attached(model):
                assert torch.allclose(model(ids()).logits, removed, atol=1e-5) is equal


# ---- files and words


@pytest.mark.parametrize("learned", [False, True])
def test_saved_and_loaded_to_the_bit(learned, tmp_path):
    h, plan = states(2, 3, 32), Plan(every(strength=0.7))
    for intervention in plan.interventions:
        if learned and intervention.operator.learnable:
            intervention.operator.train()
            for parameter in intervention.operator.parameters.values():  # as an optimiser leaves them
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    for ours, theirs in zip(plan.interventions, loaded.interventions, strict=True):
        assert type(ours.operator) is type(theirs.operator) and ours.operator.options() == theirs.operator.options()
        assert (
            ours.operator.tensors.keys() == theirs.operator.tensors.keys()
            and ours.operator.parameters.keys() == theirs.operator.parameters.keys()
        )
        assert all(torch.equal(tensor, theirs.operator.tensors[key]) for key, tensor in ours.operator.tensors.items()), ours.name
        assert torch.allclose(applied(ours.operator, h), applied(theirs.operator, h), rtol=1e-6, atol=1e-6), ours.name
        assert theirs.operator.describe() == ours.operator.describe() and theirs.operator.width == 32


def test_each_is_explained():
    described = {name: case.make().describe() for name, case in CASES.items()}
    assert all(text != type(CASES[name].make()).name for name, text in described.items())
    assert len(set(described.values())) == len(described)
    explained = Plan(every()).explain()
    assert all(text in explained for text in described.values())


# ---- what cannot be right


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_are_not_finite_are_refused(name):
    for number in CASES[name].numbers():
        with pytest.raises(NonFiniteError, match="1 of .* entries|1 NaN or infinite"):
            CASES[name].make(spoil=number)


def test_another_width_than_the_site_is_refused(tiny):
    model = tiny("llama")
    for name, case in CASES.items():
        with pytest.raises(WidthError, match=r"do not fit site[\s\S]*width 32[\s\S]*width 16"):
            Plan(Intervention(case.make(width=16), site_of(name))).attach(model)


def test_vectors_of_the_wrong_shape_are_refused():
    for make in (Add, Ablate, lambda v: Clamp(v, 0.0)):
        with pytest.raises(NonFiniteError, match="2 of 4 entries"):
            make(torch.tensor([1.0, float("nan"), float("inf"), 0.0]))
        for shape in ((1, 1, 1, 4), (0,)):
            with pytest.raises(ConfigError, match="wrong shape"):
                make(torch.ones(shape))


def test_tensors_are_copies():
    tensor = vector()
    operator = Add(tensor)
    tensor.zero_()
    assert operator.tensors["vector"].abs().sum() > 1
