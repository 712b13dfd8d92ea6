"""What callers hand to a forward pass in more than one way: full-length masks, positions of their own, caches that they reorder or that
the model makes, prefixes, models on several devices. Each is steered as the plain case is."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hand import ids, padded, vector
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, StaticCache

from steer.errors import ContextError
from steer.intervene import Add, CallGate, Intervention, Plan
from steer.intervene.attachment import Attachment
from steer.model.annotations import response_tokens
from steer.model.cache import note_pass

SITE = "layers.1.output"


def plan_on(scope="all", **options) -> Plan:
    return Plan(Intervention(Add(vector()), SITE, scope, **options))


def fired(attachment: Attachment) -> int:
    [count] = attachment.fired().values()
    return count


# ---- masks


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "positions[0]", "generated[1:2]", "last"])
def test_a_mask_as_long_as_a_static_cache(scope, compiled, tiny):
    """Shapes stay fixed in a compiled loop: the mask is 0 right of the tokens so far, and its last columns are no tokens of the pass."""
    model, batch = tiny("llama").eval(), padded("left")
    prompt_mask, steps = batch["attention_mask"], 3
    rows, width = prompt_mask.shape
    static_mask = torch.zeros(rows, width + steps + 2, dtype=torch.long)

    def run(full: bool) -> tuple[list[torch.Tensor], int]:
        torch._dynamo.reset()
        call = torch.compile(model, backend="eager") if compiled and full else model
        cache, seen = StaticCache(config=model.config, max_cache_len=static_mask.shape[1]), []
        with torch.no_grad(), plan_on(scope).attached(model) as attachment:
            for step in range(steps + 1):
                tokens = batch["input_ids"] if step == 0 else torch.full((rows, 1), 5 + step)
                mask = torch.cat([prompt_mask, torch.ones(rows, step, dtype=torch.long)], 1)
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
                mask = torch.nn.functional.pad(mask, (0, static_mask.shape[1] - mask.shape[1])) if full else mask
                seen.append(call(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
            return seen, fired(attachment)

    (expected, count), (actual, counted) = run(False), run(True)
    assert count == counted > 0
    real = prompt_mask.bool()
    assert torch.allclose(actual[0][real], expected[0][real], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(actual[1:], expected[1:], strict=True))


@pytest.mark.parametrize(("scope", "count"), [("positions[0]", 3), ("prompt[:2]", 6), ("positions[-1]", 3)])
def test_positions_that_count_padding(scope, count, tiny):
    model, batch = tiny("llama").eval(), padded("left")
    rows, width = batch["input_ids"].shape
    with torch.no_grad(), plan_on(scope).attached(model) as attachment:
        mask = batch["attention_mask"]
        model(batch["input_ids"], attention_mask=mask, position_ids=torch.arange(width).expand(rows, -1), use_cache=True)
        assert fired(attachment) == count


# ---- caches


def test_a_cache_that_the_model_made_of_its_own_accord(tiny):
    """Without use_cache=True the prompt is not part of a generation; a plan for generations only must not start in the middle of one."""
    model = tiny("llama").eval()
    with torch.no_grad(), plan_on(phases=("generate",)).attached(model) as attachment:
        cache = model(ids(1, 4)).past_key_values
        with pytest.raises(ContextError, match=r"phase validate[\s\S]*use_cache=True"):
            model(ids(1, 1), past_key_values=cache)
        cache = model(ids(1, 4), use_cache=True).past_key_values
        model(ids(1, 1), past_key_values=cache)
        assert fired(attachment) == 5
    with torch.no_grad(), plan_on().attached(model) as attachment:
        model(ids(1, 1), past_key_values=model(ids(1, 4)).past_key_values)
        assert fired(attachment) == 5


def gated(model) -> Plan:
    """Steers the generations whose first token is 7."""
    gate = CallGate(lambda h, ctx: torch.where(ctx.ids[:, :1] == 7, 1.0, -1.0).expand(h.shape[:2]), 32, per="generation")
    return Plan(Intervention(Add(vector()), SITE, "generated", gate=gate))


@pytest.mark.parametrize(
    ("how", "rows", "steered"),
    [
        ("reorder_cache", torch.tensor([1, 0]), [False, True]),
        ("batch_select_indices", torch.tensor([1]), [False]),
        ("batch_repeat_interleave", 2, [True, True, False, False]),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_decisions_follow_the_rows_of_a_cache(how, rows, steered, copied, tiny):
    model = tiny("llama").eval()
    prompt = torch.tensor([[7, 5, 6, 9], [8, 5, 6, 9]])

    def step() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache)
        changed = copy.deepcopy(cache) if copied else cache
        getattr(changed, how)(rows)
        if copied:  # the one that it was copied from stays as it was
            assert cache.get_seq_length() == 4 and cache.layers[0].keys.shape[0] == 2
        return model(torch.full((len(steered), 1), 3), past_key_values=changed).logits

    with torch.no_grad():
        plain = step()
        with gated(model).attached(model):
            logits = step()
    assert ((logits - plain).abs().amax((1, 2)) > 1e-4).tolist() == steered


def test_nothing_keeps_a_cache_alive(tiny):
    import weakref

    model = tiny("llama").eval()
    with torch.no_grad(), gated(model).attached(model):
        keys = weakref.ref(model(ids(2, 4), use_cache=True).past_key_values.layers[0].keys)
        model(ids(1, 1), use_cache=True)
    assert keys() is None


def test_the_length_of_a_static_cache_is_read_only_where_a_prompt_follows_a_prompt():
    """Reading the length waits for the device. On the meta device it cannot be read at all."""
    cache, length = SimpleNamespace(), torch.zeros((), device="meta")
    for tokens in (4, 1, 1, 4):
        assert note_pass(cache, length, tokens) is False
    with pytest.raises(RuntimeError, match="meta"):
        note_pass(cache, length, 4)


# ---- prefix tuning


@pytest.mark.parametrize(("scope", "count"), [("positions[0]", 2), ("prompt[:2]", 4), ("prompt", 12), ("generated[:1]", 2), ("last", 6)])
def test_a_tuned_prefix_is_no_part_of_the_text(scope, count, tiny):
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    tokens, options = ids(2, 6), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with plan_on(scope).attached(model) as attachment:
        model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        assert fired(attachment) == count
        with model.disable_adapter():
            model.generate(input_ids=tokens, **options)
        assert fired(attachment) == 2 * count


def test_training_with_a_tuned_prefix_and_a_custom_loss(tiny):
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()
    with plan_on(phases=("train",)).attached(model) as attachment:
        model(input_ids=ids(2, 5)).logits.sum().backward()
        assert fired(attachment) == 10


# ---- several devices


@pytest.mark.parametrize("scope", ["all", "response", "positions[1:3]", "response~2"])
def test_blocks_on_another_device(scope, tiny):
    """The meta device stands for a second GPU: an operation that mixes tensors of both devices fails."""
    model = tiny("llama").eval()
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=False)  # untied
    for part in (model.model.layers[1], model.model.layers[2], model.model.norm, model.lm_head):
        part.to("meta")

    def over(value):
        if isinstance(value, tuple):
            return tuple(map(over, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    for block in model.model.layers[1:]:
        block.register_forward_pre_hook(lambda m, a, k: (over(a), {n: over(x) for n, x in k.items()}), with_kwargs=True)
    batch = padded("left")
    with torch.no_grad(), plan_on(scope).attached(model) as attachment, response_tokens(model, batch["labels"] != -100):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    assert logits.device.type == "meta" and fired(attachment) > 0
