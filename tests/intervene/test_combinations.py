"""One plan, learned and fixed, on every way a model is wrapped at once: PEFT, compiled, gradient checkpointing, in a training step and in
generation. A LoRA that has not been trained changes nothing, so all of them must agree with the plain eager model."""

import copy

import pytest
import torch
from families import FAMILIES
from hand import padded, vector
from peft import LoraConfig, get_peft_model
from transformers.generation.configuration_utils import CompileConfig

from steer.intervene import Ablate, Add, CosineGate, Intervention, LoReFT, Plan

pytestmark = pytest.mark.usefixtures("new_process")


def learner() -> Plan:
    """Something to learn of each kind behind scopes and a gate, beside an edit that stays."""
    soft = CosineGate(vector(seed=9), 0.0, sharpness=4.0, site="layers.0.output")
    loreft = LoReFT.initial(32, rank=2, seed=1)
    loreft.tensors["bias"] += 1.0
    return Plan(
        [
            Intervention(Add(vector(seed=1)).train(), "layers.0.output", "response", strength=2.0),
            Intervention(loreft.train(), "layers.1.output", "prompt", gate=soft),
            Intervention(Ablate(vector(seed=2)), "layers.1.mlp.output", "response[:2]"),
        ]
    )


def wrapped(model, peft: bool):
    """With LoRA in one block, since dynamo compiles each of its modules anew where checkpointing breaks the graph."""
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1], r=2)) if peft else model


def step(model, call, checkpointing: bool) -> tuple[float, list[torch.Tensor]]:
    """Loss, and gradients of what the plan learns."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    plan, batch = learner(), padded("left")
    with plan.attached(model):
        loss = call(**batch, use_cache=False).loss
        loss.backward()
    return float(loss.detach()), [parameter.grad.clone() for parameter in plan.parameters()]


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step(peft, compiled, checkpointing):
    plain = FAMILIES["llama"](num_hidden_layers=2)  # a trace takes half a second for each block
    model = wrapped(copy.deepcopy(plain), peft)
    expected_loss, expected = step(plain, plain, False)
    call = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing) if compiled else model
    loss, actual = step(model, call, checkpointing)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert len(actual) == len(expected) == 4 and all(bool(gradient.any()) for gradient in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static", "static compiled"])
def test_generation(peft, cache):
    plain = FAMILIES["llama"](num_hidden_layers=2)
    model = wrapped(copy.deepcopy(plain), peft).eval()
    batch = {name: padded("left")[name] for name in ("input_ids", "attention_mask")}

    def scores(of, kind: str) -> torch.Tensor:
        config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
        config._compile_all_devices = True
        options = {"compile_config": config} if "compiled" in kind else {"disable_compile": True}
        with learner().attached(of) as plan:
            generated = of.generate(
                **batch,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=kind.split()[0],
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        assert all(count > 0 for count in plan.fired().values())
        return torch.stack(generated.logits)

    assert torch.allclose(scores(model, cache), scores(plain, "dynamic"), atol=1e-5)
