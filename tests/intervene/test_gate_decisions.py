"""Gate decisions belong to one plan and one cache: shared gates, caches that outlive a plan, padding that holds NaN."""

import pytest
import torch
from hand import ids, padded, vector
from transformers import DynamicCache

from steer.errors import ContextError
from steer.intervene import Add, CallGate, Intervention, Plan, ProbeGate
from steer.model.context_builder import build_context


def opened(open_: bool, **options) -> ProbeGate:
    return ProbeGate(torch.zeros(32), 1.0 if open_ else -1.0, **options)


def gated(gate, strength: float = 1.0) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.1.output", strength=strength, gate=gate))


def test_stacked_plans_may_share_a_gate(tiny):
    model, gate = tiny("llama"), opened(True, site="layers.0.output")
    with torch.no_grad():
        plain = model(ids()).logits
        # in the second plan the shared gate is not the first one
        unopened = Intervention(Add(vector(seed=2)), "layers.0.output", gate=opened(False))
        first, second = gated(gate), Plan([unopened, *gated(gate, -1.0).interventions])
        with first.attached(model) as first_attachment, second.attached(model, stack=True) as second_attachment:
            assert torch.allclose(model(ids()).logits, plain, atol=1e-5)
            assert first_attachment.fired() == {"add@layers.1.output": 14}
            assert second_attachment.fired() == {"add@layers.0.output": 0, "add@layers.1.output": 14}


def test_a_cache_does_not_carry_a_decision_to_another_plan(tiny):
    model, cache = tiny("llama"), DynamicCache()
    new = torch.tensor([[9], [9]])
    per = {"per": "generation"}
    with torch.no_grad():
        first = gated(opened(True, **per))
        with first.attached(model) as attachment:
            model(ids(), past_key_values=cache)
            model(new, past_key_values=cache)
            assert attachment.fired() == {"add@layers.1.output": 16}
        second = gated(opened(False, **per))
        with second.attached(model), pytest.raises(ContextError, match="prompt of this generation was not seen"):
            model(new, past_key_values=cache)
        with first.attached(model) as attachment:  # its own decision, it finds again
            model(new, past_key_values=cache)
            assert attachment.fired() == {"add@layers.1.output": 2}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_padding_may_hold_anything(pool, packed):
    gate = CallGate(lambda h, ctx: h[..., 0], 4, per="row", over="all", pool=pool)
    h = torch.full((3, 7, 4), 2.0)
    batch = padded("right")
    h[~batch["attention_mask"].bool()] = torch.nan
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if packed:
        inputs["position_ids"] = batch["attention_mask"].cumsum(1) - 1
    ctx = build_context(inputs, None)
    gate.read(h, ctx, "it")
    assert torch.equal(gate.opened(ctx, ("it",))[:, 0], torch.ones(3, 1))
