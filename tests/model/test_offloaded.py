"""Models whose weights lie elsewhere between calls: on the CPU or on the disk."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hand import edited, ids, vector
from torch import Tensor

from steer.errors import DeployError
from steer.intervene import Ablate, Add, Intervention, Plan, ProbeGate
from steer.intervene.deploy.adapter import to_adapter
from steer.intervene.deploy.bake import bake
from steer.model.accumulator import pool
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.likelihood import response_logprobs
from steer.model.site import Site
from steer.model.tokens import Row


class Pooled:
    """Accumulator that keeps the mean of each text's response."""

    def __init__(self, means: list[Tensor]) -> None:
        self.means = means

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.means.append(pool(h, weight))


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tiny, tmp_path):
    model = tiny("llama").eval()
    if request.param == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def test_steering_equals_a_hook_written_by_hand(offloaded):
    with edited(offloaded.model.layers[1], lambda h: h + 2 * vector()), torch.no_grad():
        expected = offloaded(ids()).logits
        said = offloaded.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    with Plan(Intervention(Add(vector()), "layers.1.output", strength=2.0)).attached(offloaded) as attachment, torch.no_grad():
        torch.testing.assert_close(offloaded(ids()).logits, expected)
        assert torch.equal(offloaded.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0), said)
    assert attachment.fired() == {"add@layers.1.output": 2 * 7 + 2 * (7 + 3)}


def test_gates_kept_norms_and_learned_vectors(offloaded, tiny):
    options = {"gate": ProbeGate(vector(seed=3)), "preserve_norm": True}
    learned = Add(vector()).train()
    logits = []
    for model in (offloaded, tiny("llama").eval()):
        plan = Plan([Intervention(learned, "layers.1.output", **options), Intervention(Ablate(vector(seed=4)), "layers.2.attn.output")])
        with plan.attached(model):
            logits.append(model(ids()).logits)
    torch.testing.assert_close(*logits)
    logits[0].sum().backward()
    assert learned.tensors["vector"].grad.abs().sum() > 0


def test_reading(offloaded, tiny):
    rows = [Row((5, 6, 7, 8), 2), Row((9, 5, 6), 1)]
    expected, states = [], []
    for model, pooled in ((tiny("llama").eval(), expected), (offloaded, states)):
        capture(model, rows, {Site.parse("layers.1.output"): Pooled(pooled)})
        pooled.append(response_logprobs(model, rows, pad=0))
    torch.testing.assert_close(states, expected)
    assert Anatomy.find(offloaded).fingerprint()["embedding_digest"] is None


@pytest.mark.parametrize("carrier", ["bake", "adapter"])
def test_weights_that_are_away_are_not_edited(carrier, offloaded, tmp_path):
    plan = Plan(Intervention(Add(vector()), "layers.1.output"))
    with pytest.raises(DeployError, match="offloaded"):
        bake(plan, offloaded) if carrier == "bake" else to_adapter(plan, offloaded, tmp_path / "adapter")
