"""Generation whose passes hold several tokens: steered right where the scope does not tell tokens apart, refused where it does."""

import copy

import pytest
import torch
from hand import vector
from transformers import DynamicCache, StaticCache

from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan, ProbeGate

IDS = torch.tensor([[5, 9, 11, 4, 8, 30, 22, 7, 19]])
WITH_CANDIDATES = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {}, "chunks": {"prefill_chunk_size": 2}}


def generate(model, scope, **options):
    plan = Plan(Intervention(Add(vector()), "layers.1.output", scope=scope, strength=3.0))
    with plan.attached(model):
        return model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def options_of(how, model):
    return {"assistant_model": copy.deepcopy(model)} if how == "assistant" else WITH_CANDIDATES[how]


@pytest.mark.parametrize("how", WITH_CANDIDATES)
@pytest.mark.parametrize("scope", ["response", "generated[:3]", "last", "positions[-1]", "prompt"])
def test_what_cannot_be_told_apart_is_refused(scope, how, tiny):
    model = tiny("llama").eval()
    with pytest.raises(ContextError, match="cannot be told apart"):
        generate(model, scope, **options_of(how, model))


@pytest.mark.parametrize("how", WITH_CANDIDATES)
def test_a_gate_does_not_take_candidates_for_a_prompt(how, tiny):
    model = tiny("llama").eval()
    gate = ProbeGate(vector(seed=2), per="generation", over="all")
    with Plan(Intervention(Add(vector()), "layers.1.output", gate=gate)).attached(model):
        with pytest.raises(ContextError, match="cannot be told apart"):
            model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options_of(how, model))


@pytest.mark.parametrize("how", WITH_CANDIDATES)
def test_all_tokens_are_steered_alike(how, tiny):
    model = tiny("llama").eval()
    plain = generate(model, "all")
    assert torch.equal(generate(model, "all", **options_of(how, model)), plain)


def test_a_prefix_from_a_copied_cache_is_prompt(tiny):
    model = tiny("llama").eval()
    plan = Plan(Intervention(Add(vector()), "layers.1.output", scope="response", strength=3.0))
    expected = generate(model, "response")
    with plan.attached(model):
        with torch.no_grad():
            cache = model(IDS[:, :4], use_cache=True).past_key_values
        for _ in range(2):
            said = model.generate(
                IDS, past_key_values=copy.deepcopy(cache), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
            )
            assert torch.equal(said, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("scope", ["last", "prompt[-2:]", "positions[-1]", "generated[:2]"])
def test_a_second_part_of_a_prompt_is_refused(scope, cache, tiny):
    """The first part looked like a complete prompt, but does not end it. Static caches are no exception."""
    options = {"cache_implementation": cache, "disable_compile": True, "prefill_chunk_size": 5}
    with pytest.raises(ContextError, match="cannot be told apart"):
        generate(tiny("llama").eval(), scope, **options)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_prompts_after_each_other_on_one_cache(implementation, tiny):
    """A second turn follows decoded tokens, and an emptied cache starts anew: neither is a second part."""
    model = tiny("llama").eval()
    plan = Plan(Intervention(Add(vector()), "layers.1.output", scope="prompt[-2:]"))
    cache = StaticCache(config=model.config, max_cache_len=32) if implementation == "static" else DynamicCache(config=model.config)
    with torch.no_grad(), plan.attached(model) as attachment:
        for part in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
            model(part, past_key_values=cache)
        assert list(attachment.fired().values()) == [4]
        if implementation == "static":
            cache.reset()
            model(IDS, past_key_values=cache)
            cache.reset()
            model(IDS, past_key_values=cache)
            assert list(attachment.fired().values()) == [8]
