"""Soft gates in the graph: gradients, gradient checkpointing, compiled code; and gates on wrapped models."""

import copy

import pytest
import torch
import torch._dynamo
from hand import edited, ids, packed, padded, vector
from transformers.generation.configuration_utils import CompileConfig

from steer.errors import ContextError
from steer.intervene import Add, CosineGate, FeatureGate, Intervention, Plan, ProbeGate
from steer.intervene.gate import Gate
from steer.model.context_builder import build_context

SITE, READ = "layers.1.output", "layers.0.output"
V, W = vector(seed=1), vector(seed=2)


def gates_by_name() -> dict[str, Gate]:
    return {
        "probe": ProbeGate(W, 0.2, sharpness=0.7),
        "cosine": CosineGate(W, 0.1, sharpness=5.0),
        "feature": FeatureGate(W, 0.2, 0.1, center=V, sharpness=0.7),
        "rows": ProbeGate(W, 0.2, sharpness=0.7, per="row"),
        "the largest of a row": CosineGate(W, 0.1, sharpness=5.0, per="generation", pool="max", over="all"),
        "both": ProbeGate(W, 0.2, sharpness=0.7) & ~CosineGate(V, 0.1, sharpness=5.0, per="row"),
        "either": ProbeGate(W, 0.2, sharpness=0.7) | FeatureGate(V, sharpness=0.3),
    }


def gated(gate: Gate, **options) -> Plan:
    return Plan(Intervention(Add(V).train(), SITE, gate=gate, **options))


def learned(gate: Gate) -> Gate:
    for site_gate in gate.site_gates():
        site_gate.train()
    return gate


# ---- gradients


@pytest.mark.parametrize("name", gates_by_name())
@pytest.mark.parametrize("batch", [padded("left"), packed((3, 4), prompt=2)], ids=["padded", "packed"])
def test_gradients_against_finite_differences(name, batch):
    gate = gates_by_name()[name]
    parts = list(gate.site_gates())
    names = [(site_gate, key) for site_gate in parts for key in site_gate.learnable if key in site_gate.tensors]
    values = [site_gate.tensors[key].double().requires_grad_() for site_gate, key in names]
    h = torch.randn(*batch["input_ids"].shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def value(h, *values):
        for (site_gate, key), tensor in zip(names, values, strict=True):
            site_gate.tensors[key] = tensor
        ctx = build_context(batch, None)
        for number, site_gate in enumerate(parts):
            site_gate.read(h, ctx, str(number))
        decision = gate.decision(ctx, map(str, range(len(parts))))
        closed = 1 - decision.opened if decision.closed is None else decision.closed
        return torch.cat((decision.opened, closed), -1)

    assert torch.autograd.gradcheck(value, (h, *values))


def test_gradients_of_a_plan_are_those_of_the_formula(tiny):
    batch, runs = padded("right"), []
    for by_hand in (True, False):
        model = tiny("llama")
        gate = learned(ProbeGate(W, 0.3, sharpness=0.8))
        plan = gated(gate)
        v, w, b = plan.parameters()
        if by_hand:

            def edit(h, v=v, w=w, b=b):
                return h + torch.sigmoid(0.8 * ((h * w).sum(-1, keepdim=True) + b)) * v

            with edited(model.model.layers[1], edit):
                model(**batch).loss.backward()
        else:
            with plan.attached(model):
                model(**batch).loss.backward()
        runs.append([v.grad, w.grad, b.grad, *(parameter.grad for parameter in model.parameters())])
    # what stands on padding is steered by hand, too, but no loss depends on it
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*runs, strict=True))
    assert all(gradient.abs().max() > 1e-5 for gradient in runs[0])


def run(model, plan, batch) -> list[torch.Tensor]:
    """All gradients of one training pass, and what fired."""
    model.zero_grad()
    for parameter in plan.parameters():
        parameter.grad = None
    with plan.attached(model) as attachment:
        model(**batch, use_cache=False).loss.backward()
        fired = torch.tensor(list(attachment.fired().values()))
    return [*(parameter.grad for parameter in plan.parameters()), *(parameter.grad for parameter in model.parameters()), fired]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["probe", "rows", "either"])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant, tiny):
    model, batch = tiny("llama").train(), padded("left")
    plan = gated(learned(gates_by_name()[name]))
    plain = run(model, plan, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, run(model, plan, batch), strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


INSIDE = {  # where it reads and what it steers, both at or inside checkpointed blocks
    "one block": ("layers.1.attn.output", "layers.1.mlp.output"),
    "to a block": ("layers.0.mlp.output", "layers.1.output"),
    "block to block": ("layers.0.mlp.output", "layers.2.attn.output"),
}


@pytest.mark.parametrize("where", INSIDE)
def test_sites_inside_checkpointed_blocks(where, tiny):
    """A reentrant block first runs without gradients: a gate decision that leaves the block would have none, and no error would show it."""
    read, steered = INSIDE[where]
    model, batch = tiny("llama").train(), padded("left")
    plan = Plan(Intervention(Add(V).train(), steered, gate=learned(ProbeGate(W, 0.2, sharpness=0.7, site=read))))
    plain = run(model, plan, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, run(model, plan, batch), strict=True))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if where == "one block":
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, run(model, plan, batch), strict=True))
    else:
        with pytest.raises(ContextError, match="no gradients are recorded"):
            run(model, plan, batch)
        hard = Plan(Intervention(Add(V), steered, gate=ProbeGate(W, 0.2, site=read)))
        run_hard = run(model, hard, batch)  # a comparison has no gradient to lose
        assert int(run_hard[-1]) > 0


# ---- compiled


def test_changes_of_a_gate_trace_nothing_again(tiny, backend):
    """Threshold, sharpness, probe and strength are buffers; hard and soft gates, per token and per row, in one plan."""
    model, batch = tiny("llama"), padded("left")
    hard = ProbeGate(W, 0.1, site=READ)
    row, soft = CosineGate(V, 0.05, per="row", sharpness=4.0), ProbeGate(W, -0.3, sharpness=0.5, per="generation", over="all")
    last = Intervention(Add(W), "layers.2.output", gate=row | soft, preserve_norm=True)
    plan = Plan([Intervention(Add(V), SITE, gate=hard & ~row), last])
    first, second = plan.interventions
    probe, cosine = first.gate.site_gates()
    shared, unshared = second.gate.site_gates()
    assert shared is cosine
    seen, fired = [], []
    with plan.attached(model) as attachment, torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for change in (
            lambda: None,
            lambda: probe.tensors["bias"].fill_(1.5),
            lambda: cosine.tensors["threshold"].fill_(-0.2),
            lambda: unshared.tensors["sharpness"].fill_(20.0),
            lambda: probe.tensors["vector"].copy_(-W[None]),
            lambda: attachment.set_strength(0.5),
        ):
            change()
            before = attachment.fired()
            actual = compiled(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
            between = attachment.fired()
            expected = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
            assert torch.allclose(actual, expected, atol=1e-5)
            after = attachment.fired()
            assert all(after[name] - between[name] == between[name] - before[name] for name in after)
            seen.append(actual)
            fired.append(after)
    assert backend.graphs == 1
    assert [float((a - b).abs().max()) > 1e-4 for a, b in zip(seen, seen[1:], strict=False)] == [True] * 5


def test_a_compiled_training_step_has_the_gradients_of_the_eager_one(tiny, backend):
    runs = []
    for compiled in (False, True):
        model = tiny("llama").train()
        plan = gated(learned(ProbeGate(W, 0.2, sharpness=0.7, site=READ) & CosineGate(V, 0.0, sharpness=2.0, per="row")))
        call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        gradients = []
        with plan.attached(model):
            for bias in (0.2, -0.4):
                list(plan.interventions[0].gate.site_gates())[0].tensors["bias"].data.fill_(bias)
                call(**padded("right"), use_cache=False).loss.backward()
                gradients += [parameter.grad.clone() for parameter in (*plan.parameters(), *model.parameters())]
        runs.append(gradients)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs, strict=True))
    assert backend.graphs == 1


def test_compiled_decoding_with_a_static_cache(tiny, backend):
    """What the prompt decided is read from the cache inside the graph."""
    model, batch = tiny("llama"), padded("left", (7, 4, 6, 5))

    def generate(compiled: bool) -> torch.Tensor:
        config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
        config._compile_all_devices = compiled
        return model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            compile_config=config if compiled else None,
            disable_compile=not compiled,
            cache_implementation="static",
        )

    plain = generate(False)
    plan = Plan(Intervention(Add(8 * V), SITE, gate=ProbeGate(W, 0.0, site=READ, per="generation")))
    tensors = next(plan.interventions[0].gate.site_gates()).tensors
    changed, graphs = [], []
    with plan.attached(model):
        for bias in (-1e9, 1e9, 0.0, 1.0, -1.0):
            tensors["bias"].fill_(bias)
            eager, compiled = generate(False), generate(True)
            assert torch.equal(eager, compiled)
            changed.append(int((compiled != plain).any(1).sum()))
            graphs.append(backend.graphs)
        assert set(graphs) == {graphs[0]} and graphs[0] > 0
    assert changed[:2] == [0, 4] and any(0 < count < 4 for count in changed[2:])


# ---- wrapped


def test_gates_on_a_peft_model(tiny):
    from peft import LoraConfig, get_peft_model

    batch, gate = padded("left"), ProbeGate(W, 0.1, site=READ, per="row") & ProbeGate(V, 0.1)
    with torch.no_grad(), gated(gate).attached(plain := tiny("llama")) as attachment:
        expected, fired = plain(**batch).logits, attachment.fired()
    wrapped = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    with gated(copy.deepcopy(gate)).attached(wrapped) as attachment:
        out = wrapped(**batch)
        assert torch.allclose(out.logits, expected, atol=1e-5) and attachment.fired() == fired and 0 < fired["add@layers.1.output"] < 17
        out.loss.backward()
        assert attachment.parameters()[0].grad.abs().max() > 0
        with torch.no_grad(), wrapped.disable_adapter():  # the reference of DPO and GRPO
            wrapped(**batch, use_cache=False)
        assert attachment.fired() == fired


def test_values_between_open_and_closed_steer_by_that_share(tiny):
    model, x = tiny("llama"), ids()
    for bias in (-2.0, 0.0, 1.0):
        plan = gated(ProbeGate(torch.zeros(32), bias, sharpness=1.5))
        with torch.no_grad():
            with plan.attached(model) as attachment:
                logits = model(x).logits
            with edited(model.model.layers[1], lambda h, b=bias: h + torch.sigmoid(torch.tensor(1.5 * b)) * V):
                assert torch.allclose(logits, model(x).logits, atol=1e-5)
        assert attachment.fired() == {"add@layers.1.output": 14 * (bias > 0)}
