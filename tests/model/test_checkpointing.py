"""Gradient checkpointing recomputes blocks in the backward pass: every recompute must be steered exactly as its own first run."""

import pytest
import torch
from hand import ids, padded, vector
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, apply_activation_checkpointing, checkpoint_wrapper

from steer.errors import ContextError, HookDidNotRunError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.annotations import response_tokens

MODES = ["none", "reentrant", "non-reentrant", "wrapper", "reentrant wrapper"]
LAYER = "LlamaDecoderLayer"


def plan(scope: str = "response") -> Plan:
    """Blocks, and parts of blocks that run a second time under checkpointing."""
    sites = ("layers.1.output", "layers.0.attn.z", "layers.1.attn.output", "layers.2.mlp.output", "layers.2.mlp.neurons")
    widths = {"layers.2.mlp.neurons": 64}
    additions = [Intervention(Add(vector(widths.get(site, 32), seed)), site, scope) for seed, site in enumerate(sites)]
    return Plan([*additions, Intervention(Ablate(torch.stack([vector(seed=8), vector(seed=9)])), "layers.1.mlp.output", scope)])


def checkpointed(model, mode):
    model.train().config.use_cache = False
    if mode in ("reentrant", "non-reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    elif mode != "none":
        kind = CheckpointImpl.REENTRANT if mode == "reentrant wrapper" else CheckpointImpl.NO_REENTRANT
        model.enable_input_require_grads()
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=kind),
            check_fn=lambda module: type(module).__name__ == LAYER,
        )
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    names = {name: name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()}
    return {names[name]: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-6), name


def one_batch(model):
    model(**padded("left")).loss.backward()


def two_shapes(model):
    (model(**padded("left")).loss + model(**padded("right", (3, 5))).loss).backward()


def same_shape_twice(model):
    """The two passes differ in nothing but their masks."""
    (model(**padded("left")).loss + 2 * model(**padded("right")).loss).backward()


def one_after_the_other_backwards(model):
    first, second = model(**padded("left")).loss, model(**padded("right")).loss
    second.backward()
    first.backward()


def another_pass_before_the_backward(model):
    loss = model(**padded("left")).loss
    with torch.no_grad(), response_tokens(model, torch.zeros(3, 7)):
        model(ids(3), use_cache=False)
    loss.backward()


def an_unused_pass(model):
    model(**padded("right"))
    model(**padded("left")).loss.backward()


def middle_hidden_state(model):
    model(**padded("left"), output_hidden_states=True).hidden_states[2].square().sum().backward()


def accumulated(model):
    for side in ("left", "right", "left"):
        model(**padded(side)).loss.backward()


def retained(model):
    loss = model(**padded("left")).loss
    loss.backward(retain_graph=True)
    loss.backward()


COURSES = [
    one_batch,
    two_shapes,
    same_shape_twice,
    one_after_the_other_backwards,
    another_pass_before_the_backward,
    an_unused_pass,
    middle_hidden_state,
    accumulated,
    retained,
]


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("course", COURSES)
def test_gradients_are_those_without_checkpointing(mode, course, tiny):
    if course is middle_hidden_state and "wrapper" in mode:
        return  # transformers records the block inside the wrapper, which is not the stream that goes on
    by_mode, counts = {}, {}
    for which in ("none", mode):
        model = checkpointed(tiny("llama"), which)
        with plan().attached(model) as steered:
            course(model)
        by_mode[which], counts[which] = gradients(model), steered.fired()
    same(by_mode[mode], by_mode["none"])
    assert counts[mode] == counts["none"] and all(counts[mode].values())


def test_steering_matters_for_these_gradients(tiny):
    """Guards the test above: without the plan, or with it on other tokens, the gradients differ."""
    by_scope = []
    for scope in ("response", "prompt", None):
        model = checkpointed(tiny("llama"), "reentrant")
        if scope is None:
            same_shape_twice(model)
        else:
            with plan(scope).attached(model):
                same_shape_twice(model)
        by_scope.append(gradients(model)["model.layers.0.self_attn.q_proj.weight"])
    assert not any(torch.allclose(by_scope[i], by_scope[j], atol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("mode", MODES[1:3])
def test_dpo_reference_pass_between_policy_pass_and_backward(mode, tiny):
    """The recompute belongs to the policy pass, although the reference pass, on the same rows, came last and is not steered."""
    by_mode = {}
    for which in ("none", mode):
        torch.manual_seed(0)
        peft = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        checkpointed(peft, which)
        batch = padded("left")
        with plan().attached(peft):
            policy = peft(**batch).logits
            with torch.no_grad(), peft.disable_adapter():
                reference = peft(**batch).logits
            (policy - reference).square().mean().backward()
        by_mode[which] = gradients(peft)
    same(by_mode[mode], by_mode["none"])


def test_a_replay_that_cannot_be_placed_is_an_error(tiny):
    """A loss on an activation that the model does not return: nothing says which pass is being differentiated."""
    model = checkpointed(tiny("llama"), "reentrant")
    outputs = []
    model.model.layers[2].register_forward_hook(lambda _, __, output: outputs.append(output))
    with plan().attached(model):
        model(**padded("left"))
        with pytest.raises(ContextError, match="outside a forward pass"):
            outputs[0].square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_checkpointed_as_a_whole(reentrant, tiny):
    """The recompute is a full pass of its own: steered, but not counted again."""
    runs, counts = [], []
    for checkpoint in (False, True):
        model = tiny("llama").train()
        embeds = model.get_input_embeddings()(padded("left")["input_ids"]).detach().requires_grad_()

        def run(embeds, model=model):
            batch = padded("left")
            return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss

        with plan().attached(model) as steered:
            loss = torch.utils.checkpoint.checkpoint(run, embeds, use_reentrant=reentrant) if checkpoint else run(embeds)
            loss.backward()
        runs.append(gradients(model) | {"embeds": embeds.grad})
        counts.append(steered.fired())
    same(runs[1], runs[0])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_recompute_does_not_count_as_the_next_pass(mode, tiny):
    """A module replaced after a backward pass is noticed in the next forward pass, not in the one after it."""
    model = checkpointed(tiny("llama"), mode)
    attention = next(module for module in model.modules() if type(module).__name__ == "LlamaAttention")
    with Plan(Intervention(Add(vector()), "layers.0.attn.z")).attached(model):
        one_batch(model)
        attention.o_proj = torch.nn.Linear(32, 32, bias=False)
        with pytest.raises(HookDidNotRunError, match="layers.0.attn.z"):
            model(**padded("left"))
