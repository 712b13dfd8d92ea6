"""Scores of models that are wrapped, checkpointed, adapted, compiled, frozen or run in another precision: those of the plain model."""

from __future__ import annotations

from contextlib import nullcontext

import peft
import pytest
import torch
from accelerate import cpu_offload
from circuits.attribution_helpers import CLEAN, close, pairs, rows, target
from families import FAMILIES
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from steer.circuits import ComponentScores, attribute, information_flow
from steer.errors import DeployError

HALF = 0.05  # of the largest score


def scored(model, method="eap", rule="plain") -> ComponentScores:
    return attribute(model, pairs(model), target, method=method, rule=rule, neurons=True, progress=False)


@pytest.fixture(scope="module")
def plain() -> dict[str, ComponentScores]:
    return {rule: scored(FAMILIES["llama"](), rule=rule) for rule in ("plain", "gim", "relp")}


def adapted(model):
    """LoRA adapters, as they begin: their product is zero, and their weights count once it is not."""
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names)).eval()


def checkpointed(model):
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(block)
    return model


def with_checkpointing_of_transformers(model):
    model.gradient_checkpointing_enable()
    return model.train()


def with_eager_attention(model):
    model.set_attn_implementation("eager")
    return model


WRAPPED = {
    "adapted": adapted,
    "checkpointed": checkpointed,
    "checkpointed by transformers, in training mode": with_checkpointing_of_transformers,
    "compiled": torch.compile,
    "frozen": lambda model: model.requires_grad_(False),
    "eager": with_eager_attention,
    "float64": lambda model: model.double(),
}


RULES_OF = {"adapted": ("plain", "gim", "relp"), "checkpointed": ("plain", "gim", "relp"), "eager": ("plain", "gim")}


@pytest.mark.parametrize(("how", "rule"), [(how, rule) for how in WRAPPED for rule in RULES_OF.get(how, ("plain",))])
def test_a_wrapped_model_has_the_scores_of_the_plain_one(plain, tiny, how, rule):
    model = WRAPPED[how](tiny("llama"))
    mode, scores = model.training, scored(model, rule=rule)
    assert close(scores.nodes, plain[rule].nodes, 1e-5) and close(scores.edges, plain[rule].edges, 1e-5)
    assert all(close(scores.neurons[layer], plain[rule].neurons[layer], 1e-5) for layer in scores.neurons)
    assert model.training == mode and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["mask_gradient", "eap_gp"])
def test_what_a_method_puts_in_place_is_there_when_a_checkpointed_block_runs_again(tiny, method):
    assert torch.equal(scored(checkpointed(tiny("llama")), method).edges, scored(tiny("llama"), method).edges)


def test_an_adapter_that_learned_is_that_of_the_merged_model(tiny):
    model = adapted(tiny("llama"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    scores = scored(model)
    assert close(scores.edges, scored(model.merge_and_unload()).edges, 1e-4)


@pytest.mark.parametrize("rule", ["plain", "gim", "relp"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_near(plain, tiny, how, rule):
    model = tiny("llama").bfloat16() if how == "bfloat16" else tiny("llama")
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        scores = scored(model, rule=rule)
    assert close(scores.nodes, plain[rule].nodes, HALF) and close(scores.edges, plain[rule].edges, HALF)


def test_offloaded_weights_are_refused(tiny):
    model = cpu_offload(tiny("llama"), execution_device=torch.device("cpu"))
    for run in (lambda: scored(model), lambda: information_flow(model, rows(CLEAN), progress=False)):
        with pytest.raises(DeployError, match=r"offloaded[\s\S]*without offloading"):
            run()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_the_caller_has_none(plain, tiny, around):
    model = tiny("llama")
    with around():
        assert torch.equal(scored(model).edges, plain["plain"].edges)


def test_a_training_step_goes_on_as_if_nothing_had_been(tiny):
    def gradient(between: bool) -> torch.Tensor:
        model = tiny("llama").train()
        loss = model(input_ids=torch.tensor([[5, 9, 33, 17]]), labels=torch.tensor([[5, 9, 33, 17]])).loss
        if between:
            scored(model, rule="gim")
        loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad

    assert torch.equal(gradient(between=True), gradient(between=False))
