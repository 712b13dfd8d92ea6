"""Gates against numbers worked out by hand, their combinations, files and mistakes."""

import itertools

import pytest
import torch
from hand import attachment_of, ids, padded, vector
from method_tables import check_table

from steer.errors import ConfigError, ContextError, NonFiniteError, WidthError
from steer.intervene import GATES, Ablate, Add, CallGate, CosineGate, FeatureGate, Intervention, Plan, ProbeGate
from steer.intervene.gate import Gate, SiteGate
from steer.model.annotations import chat_roles
from steer.model.context_builder import build_context

SITE, READ = "layers.1.output", "layers.0.output"
V, W = vector(seed=1), vector(seed=2)


def gated(gate: Gate, scope: str = "all", **options) -> Plan:
    return Plan(Intervention(Add(V), SITE, scope, gate=gate, **options))


def decided(gate: Gate, h: torch.Tensor, **inputs) -> torch.Tensor:
    """What a gate says of activations, [batch, tokens or 1]."""
    inputs = {"input_ids": torch.ones(h.shape[:2], dtype=torch.long), **inputs}
    ctx = build_context(inputs, None)
    site_gates = list(gate.site_gates())
    for number, site_gate in enumerate(site_gates):
        site_gate.read(h, ctx, str(number))
    return gate.opened(ctx, tuple(map(str, range(len(site_gates))))).squeeze(-1)


# ---- every kind


H = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[-1.0, 0.0], [1.0, -1.0]]])
BY_HAND = {
    "probe": (lambda **o: ProbeGate(torch.tensor([2.0, -1.0]), 1.5, **o), [[2 * 3 - 4 + 1.5, -2 + 1.5], [-2 + 1.5, 2 + 1 + 1.5]]),
    "cosine": (lambda **o: CosineGate(torch.tensor([0.0, 5.0]), 0.5, **o), [[0.8 - 0.5, 1 - 0.5], [0 - 0.5, -(0.5**0.5) - 0.5]]),
    "feature": (  # (h - b_dec) W + b - threshold
        lambda **o: FeatureGate(torch.tensor([1.0, 1.0]), -0.5, 0.25, center=torch.tensor([1.0, 2.0]), **o),
        [[2 + 2 - 0.75, -1 + 0 - 0.75], [-2 - 2 - 0.75, 0 - 3 - 0.75]],
    ),
    "call": (lambda **o: CallGate(lambda h, ctx: h[..., 0] * 2, 2, **o), [[6.0, 0.0], [-2.0, 2.0]]),
}


def test_every_kind_of_gate_is_tested():
    check_table(GATES, BY_HAND, "BY_HAND of tests/intervene/test_gates.py", "how to make the gate, and its margins on H worked out by hand")
    assert all(name == GATES.get(name).name for name in GATES)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_gate_compares_what_its_formula_says(name):
    make, margins = BY_HAND[name]
    margins = torch.tensor(margins)
    assert torch.allclose(make().margin(H, build_context({"input_ids": torch.ones(2, 2)}, None)), margins, atol=1e-6)
    assert torch.equal(decided(make(), H), (margins > 0).float())
    assert torch.allclose(decided(make(sharpness=3.0), H), torch.sigmoid(3 * margins), atol=1e-6)
    for pool, pooled in (("mean", margins.mean(1)), ("max", margins.max(1).values)):
        actual = decided(make(per="row", over="all", pool=pool, sharpness=3.0), H)
        assert torch.allclose(actual, torch.sigmoid(3 * pooled)[:, None], atol=1e-6)
        assert torch.equal(decided(make(per="row", over="all", pool=pool), H), (pooled > 0).float()[:, None])


@pytest.mark.parametrize("name", sorted(set(BY_HAND) - {"call"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_large_activations_of_every_dtype(name, dtype):
    h = torch.stack([100 * V, -100 * V, torch.zeros(32), W * 1e3])[None].to(dtype)
    gate = {"probe": ProbeGate, "cosine": CosineGate, "feature": FeatureGate}[name](V)
    assert decided(gate, h).tolist() == [[1.0, 0.0, 0.0, float(V @ W > 0)]]
    assert decided(gate, h).dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_the_tokens_that_are_looked_at():
    h = torch.tensor([[-1.0, 5.0, -1.0, -1.0], [3.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, -9.0]])[..., None]
    labels = torch.tensor([[-100, -100, 1, 1], [-100, -100, -100, 1], [-100, 1, 1, 1]])
    for over, margins in {
        "prompt": [[-1, 5], [3, -1, -1], [1]],
        "response": [[-1, -1], [-1], [1, 1, -9]],
        "last": [[-1], [-1], [-9]],
        "positions[0,1]": [[-1, 5], [3, -1], [1, 1]],
    }.items():
        for pool, pooled in (("mean", [sum(row) / len(row) for row in margins]), ("max", [max(row) for row in margins])):
            gate = ProbeGate(torch.ones(1), per="row", over=over, pool=pool, sharpness=1.0)
            assert torch.allclose(decided(gate, h, labels=labels)[:, 0], torch.sigmoid(torch.tensor(pooled)))
    with_roles = ProbeGate(torch.ones(1), per="row", over="role[user]")
    ctx = build_context({"input_ids": torch.ones(1, 4)}, None, turns=torch.tensor([[0, 1, 1, 2]]))
    with_roles.read(h[:1], ctx, "it")
    assert with_roles.opened(ctx, ("it",)).flatten().tolist() == [1.0]  # 5 and -1


# ---- combinations


def test_truth_tables():
    for a, b in itertools.product((0.0, 1.0), repeat=2):
        h = torch.tensor([[[a * 2 - 1, b * 2 - 1]]])
        first, second = ProbeGate(torch.tensor([1.0, 0.0])), ProbeGate(torch.tensor([0.0, 1.0]))
        for gate, expected in (
            (first & second, a and b),
            (first | second, a or b),
            (~first, not a),
            (~(first | ~second) & ~first, not (a or not b) and not a),
            (first & ~second | ~first & second, a != b),
        ):
            assert decided(gate, h).item() == float(expected)


def test_soft_values_multiply_as_independent_chances():
    h = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    first, second = (ProbeGate(torch.eye(2)[i], 0.1, sharpness=2.0) for i in (0, 1))
    a, b = decided(first, h), decided(second, h)
    assert torch.allclose(decided(first & second, h), a * b)
    assert torch.allclose(decided(first | second, h), a + b - a * b)
    assert torch.allclose(decided(~first, h), 1 - a)
    assert torch.allclose(decided(~(first & second), h), decided(~first | ~second, h))  # de Morgan


def test_gates_of_tokens_and_of_rows_combine():
    h = torch.tensor([[[1.0], [-1.0], [3.0]], [[-5.0], [1.0], [1.0]]])
    token, row = ProbeGate(torch.ones(1)), ProbeGate(torch.ones(1), per="row", over="all")
    assert decided(token & row, h).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert decided(token | row, h).tolist() == [[1, 1, 1], [0, 1, 1]]


def test_a_row_without_a_token_to_look_at_is_not_decided():
    """Neither the gate nor its negation opens; in an `or`, the second gate decides alone."""
    h, labels = torch.ones(2, 2, 1), torch.tensor([[-100, -100], [1, 1]])
    gate, always = ProbeGate(torch.ones(1), per="row"), ProbeGate(torch.zeros(1), 1.0)
    for combined, expected in ((gate, [1, 0]), (~gate, [0, 0]), (~~gate, [1, 0]), (gate | always, [1, 1]), (~gate & always, [0, 0])):
        assert decided(combined, h, labels=labels)[:, 0].tolist() == expected


# ---- files


@pytest.mark.parametrize("form", ["plan", "plan.safetensors"])
def test_saved_and_loaded_to_the_bit(form, tiny, tmp_path):
    model, batch = tiny("llama"), padded("left")
    probe = ProbeGate(W, 0.3, site=READ, per="generation", over="prompt[-2:]", pool="max", sharpness=7.3)
    gate = probe & ~(CosineGate(V, 0.123) | FeatureGate(W, 0.7, 0.1, center=V, per="row", over="all"))
    plan = Plan([Intervention(Add(V), SITE, gate=gate, preserve_norm=True), Intervention(Add(W), READ)])
    loaded = Plan.load(plan.save(tmp_path / form))
    assert loaded.explain() == plan.explain()
    assert loaded.interventions[0].to_dict() == plan.interventions[0].to_dict() and loaded.interventions[1].gate is None
    ours, theirs = (each.interventions[0].tensors for each in (plan, loaded))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    outputs = []
    for each in (plan, loaded):
        with each.attached(model), torch.no_grad():
            outputs += [model(**batch).logits, model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_a_learned_gate_stays_one_gate_and_stays_shared(tmp_path):
    gate = CosineGate(W, 0.2, sharpness=2.0).train()
    operator = Add(V).train()
    unshared = Intervention(Ablate(W), "layers.2.output", gate=ProbeGate(W, sharpness=1.0).train())
    plan = Plan([Intervention(operator, SITE, gate=gate), Intervention(operator, READ, gate=~gate), unshared])
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert [tuple(p.shape) for p in loaded.parameters()] == [tuple(p.shape) for p in plan.parameters()]
    assert len(plan.parameters()) == 5
    first, second, third = ({name: id(parameter) for name, parameter in i.parameters.items()} for i in loaded.interventions)
    assert first == second and not set(first.values()) & set(third.values())
    assert not isinstance(third["gate0.bias"], torch.nn.Parameter) and loaded.interventions[2].operator.parameters == {}
    attachment = attachment_of(plan)
    state = attachment.state_dict()
    with torch.no_grad():
        plan.parameters()[0].zero_()
    attachment.load_state_dict(state)
    assert torch.equal(plan.parameters()[0][0], V)


# ---- mistakes


def test_a_gate_that_would_decide_too_late(tiny):
    model = tiny("llama")
    for read, steered in (("layers.2.output", SITE), ("layers.1.mlp.output", "layers.1.attn.output"), (SITE, "layers.1.input")):
        with pytest.raises(ConfigError, match="would decide after the edit"):
            Plan(Intervention(Add(V), steered, gate=ProbeGate(W, site=read))).attach(model)
    late = Plan(Intervention(Add(V), "module:model.layers.0.mlp:output", gate=ProbeGate(W, site="module:model.layers.2.mlp:output")))
    with late.attached(model), pytest.raises(ContextError, match="did not decide before"):
        model(ids())


def test_widths(tiny):
    with pytest.raises(WidthError, match="gate 'probe' does not fit"):
        gated(ProbeGate(vector(31))).attach(tiny("llama"))
    with pytest.raises(WidthError, match="gate 'cosine' does not fit"):
        gated(CosineGate(vector(), site="logits") & ProbeGate(W)).attach(tiny("llama"))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ProbeGate(torch.randn(2, 32)), ConfigError),
        (lambda: ProbeGate(W, torch.tensor([0.0, 1.0])), ConfigError),
        (lambda: CosineGate(torch.zeros(32)), ConfigError),
        (lambda: ProbeGate(W * torch.nan), NonFiniteError),
        (lambda: CosineGate(W, float("inf")), NonFiniteError),
        (lambda: ProbeGate(W, per="tokens"), ConfigError),
        (lambda: ProbeGate(W, per="row", pool="median"), ConfigError),
        (lambda: ProbeGate(W, over="everything"), ConfigError),
        (lambda: ProbeGate(W, over="response~8"), ConfigError),
        (lambda: ProbeGate(W, sharpness=0.0), ConfigError),
        (lambda: ProbeGate(W, sharpness=-1.0), ConfigError),
        (lambda: ProbeGate(W, sharpness=float("nan")), ConfigError),
        (lambda: ProbeGate(W, sharpness=float("inf")), NonFiniteError),
        (lambda: ProbeGate(W, site="layers.one"), ValueError),
        (lambda: ProbeGate(W).train(), ConfigError),
        (lambda: CallGate(lambda h, ctx: h, 32, sharpness=1.0).train(), ConfigError),
    ],
)
def test_arguments_that_make_no_gate(make, error):
    with pytest.raises(error):
        make()


def test_a_call_can_neither_be_saved_nor_answer_anything(tiny, tmp_path):
    model = tiny("llama")
    with pytest.raises(ConfigError, match="cannot be saved"):
        gated(~CallGate(lambda h, ctx: h[..., 0], 32)).save(tmp_path / "plan")
    assert not list(tmp_path.iterdir())
    for function in (lambda h, ctx: h, lambda h, ctx: 1.0, lambda h, ctx: None, lambda h, ctx: h[:, 0, 0]):
        with gated(CallGate(function, 32)).attached(model), pytest.raises(ContextError, match="does not decide for each token"):
            model(ids())


def test_a_prompt_that_cannot_be_told(tiny):
    model = tiny("llama")
    with gated(ProbeGate(W, per="row")).attached(model), pytest.raises(ContextError, match="cannot tell prompt from response"):
        model(ids(), use_cache=False)
    gate = ProbeGate(torch.zeros(32), 1.0, per="row", over="role[user]")
    with gated(gate).attached(model) as attachment, chat_roles(model, torch.tensor([[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 2, 2, 2]])):
        model(ids(), use_cache=False)
        assert attachment.fired() == {"add@layers.1.output": 7}  # the second row has no user


def test_a_custom_kind_of_gate():
    class Norm(SiteGate):
        """Opens where an activation is long."""

        name = "norm"

        def margin(self, h, ctx):
            return h.norm(dim=-1) - self.tensors["length"]

    gate = Norm({"length": torch.tensor([3.0])}, 2)
    assert decided(gate, H).tolist() == [[1, 0], [0, 0]] and str(gate) == "norm per token"


@pytest.mark.parametrize("combine", [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a])
def test_pythons_own_words_would_drop_a_gate(combine):
    a, b = ProbeGate(torch.ones(4)), ProbeGate(-torch.ones(4))
    with pytest.raises(ConfigError, match=r"do not combine by and, or, not[\s\S]*& for and"):
        combine(a, b)
