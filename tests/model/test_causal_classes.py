"""Every class in transformers' own table of causal language models, built tiny: found, steered, read and generated with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hand import hook_count, recorded, relative, vector
from tiny_causal import UNBUILT, build, model_types
from torch import Tensor, nn
from transformers import PreTrainedModel

from steer.errors import AnatomyError, ContextError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy

# the tensors between their blocks hold more, or other, than one entry per token, or there are no blocks
NO_STREAM = {
    "cpmant": "prompt tokens stand in front of the text inside the model",
    "prophetnet": "the streams of its n-grams stand one after the other on the axis of tokens",
    "xlm": "attention and MLP lie in separate lists: there is no block",
}
# they keep no cache, or one of their own kind, so that a decoded token looks like a prompt
OWN_CACHE = ("openai-gpt", "reformer", "rwkv", "xlm", "xlnet")
OWN_GENERATE = ("musicgen", "musicgen_melody")  # it shifts the codebooks of audio against each other
BUILT = [model_type for model_type in model_types() if model_type not in UNBUILT]
STEERED = [model_type for model_type in BUILT if model_type not in NO_STREAM]


@cache
def model_of(model_type: str) -> PreTrainedModel:
    transformers.logging.set_verbosity_error()
    return build(model_type)


def ids() -> Tensor:
    """[2, 6] ordinary tokens."""
    return torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(input_ids=ids()).logits


@contextmanager
def added_to(block: nn.Module, added: Tensor) -> Iterator[None]:
    """Adds to every stream its part: streams are an axis before the width, the first axis of all, or there is one."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        streams = added.view(-1, h.shape[-1])  # [streams, width]
        if h.dim() == 4 and h.shape[0] != 2:
            streams = streams[:, None, None]
        new = h + (streams if h.dim() == 4 else added)
        if isinstance(output, Tensor):
            return new
        return output._replace(hidden_states=new) if hasattr(output, "_replace") else type(output)((new, *output[1:]))

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_nearly_all_of_the_table_is_covered():
    assert set(UNBUILT) | set(NO_STREAM) <= set(model_types())
    assert len(STEERED) >= 0.95 * len(model_types())


@pytest.mark.parametrize("model_type", STEERED)
def test_steering_at_every_block_is_a_hook_by_hand(model_type):
    model = model_of(model_type)
    plain, hooks = logits(model), hook_count(model)
    anatomy = Anatomy.find(model)
    assert hook_count(model) == hooks and not any(module.training for module in model.modules())
    assert torch.equal(logits(model), plain)
    width = anatomy.point("layers.0.output").width
    added = [vector(width, seed) for seed in range(anatomy.n_layers)]
    sites = [f"layers.{layer}.output" for layer in range(anatomy.n_layers)]
    plan = Plan([Intervention(Add(v), site) for v, site in zip(added, sites, strict=True)])
    with plan.attached(model) as attachment:
        steered = logits(model)
        assert set(attachment.fired().values()) <= {12 * round for round in (1, 2, 3, 4)}
        attachment.set_strength(0.0)
        assert torch.equal(logits(model), plain)
    with ExitStack() as hand:
        for block, v in zip(anatomy.blocks, added, strict=True):
            hand.enter_context(added_to(block, v))
        expected = logits(model)
    assert torch.allclose(steered, expected, atol=1e-4, rtol=1e-4) and not torch.allclose(steered, plain, atol=1e-3)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("model_type", STEERED)
def test_what_is_written_adds_up(model_type):
    """Where all writers of a block have a site, input + what they add = output; else the site is refused with what there is instead."""
    model = model_of(model_type)
    anatomy = Anatomy.find(model)
    for layer, parts in enumerate(anatomy.parts):
        sites = [f"layers.{layer}.{part}.output" for part in ("attn", "mixer", "mlp")]
        if not parts.writers:
            assert parts.reason
            for site in sites:
                with pytest.raises(SiteError, match="use 'layers"):
                    anatomy.point(site)
    try:
        written = anatomy.written_sites()
    except SiteError:
        return
    sites = [str(site) for site in written] + [f"layers.{layer}.output" for layer in range(anatomy.n_layers)]
    with recorded(model, sites) as seen:
        logits(model)
    total = seen["embed"].clone()
    for layer in range(anatomy.n_layers):
        total += sum(seen[str(site)].reshape(total.shape) for site in written if site.layer == layer)
        assert relative(total, seen[f"layers.{layer}.output"]) < 1e-4, layer


@pytest.mark.parametrize("model_type", [model_type for model_type in STEERED if model_type not in OWN_GENERATE])
def test_generation_with_a_cache_is_that_without(model_type):
    model = model_of(model_type)
    anatomy = Anatomy.find(model)
    v = vector(anatomy.width)
    alone, recomputed = generated(model, use_cache=True), generated(model, use_cache=False)
    with Plan(Intervention(Add(v), "layers.1.output")).attached(model):
        cached = generated(model, use_cache=True)
        assert not torch.allclose(cached, alone, atol=1e-4)
        if torch.allclose(alone, recomputed, atol=1e-4):
            assert torch.allclose(cached, generated(model, use_cache=False), atol=1e-3)
    plan = Plan(Intervention(Add(v), "layers.1.output", scope="generated"))
    with plan.attached(model) as attachment:
        if model_type in OWN_CACHE:
            with pytest.raises(ContextError, match="told apart|tell prompt from"):
                generated(model, use_cache=True)
            return
        generated(model, use_cache=True)
        assert list(attachment.fired().values()) == [2 * 3]


def generated(model: PreTrainedModel, *, use_cache: bool) -> Tensor:
    """[2, 4, vocabulary] scores of 4 decoded tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = ids()
        output = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits, 1)


@pytest.mark.parametrize("model_type", sorted(NO_STREAM))
def test_a_model_without_a_stream_of_tokens_is_refused(model_type):
    with pytest.raises((SiteError, AnatomyError), match="module:"):
        Anatomy.find(model_of(model_type)).point("layers.0.output")
