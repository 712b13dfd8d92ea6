"""Scopes in models: what a window, a decay or a turn selects is what is steered, whatever cache, batch and order of events."""

from __future__ import annotations

import copy

import pytest
import torch
from hand import edited, ids, padded, vector
from torch import Tensor
from transformers import DynamicCache, StaticCache

from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan
from steer.model.annotations import chat_roles, response_tokens
from steer.model.tokens import encode_chat

V = 3 * vector()
NAME = "add@layers.1.output"


def plan_on(scope: str, **options) -> Plan:
    return Plan(Intervention(Add(V), "layers.1.output", scope, **options))


def by_hand(model, weight: Tensor):
    """weight: [batch, tokens] of the vector."""
    return edited(model.model.layers[1], lambda h: h + weight[..., None] * V)


def cache_of(model, static: bool):
    return StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)


class Talk:
    """A plain loop: a left-padded prompt, then given tokens one by one. Logits are those of each pass's last token."""

    def __init__(self, model, static: bool, batch: dict[str, Tensor] | None = None) -> None:
        batch = padded("left") if batch is None else batch
        self.model, self.cache = model, cache_of(model, static)
        self.mask = batch["attention_mask"]
        self.logits = [self._pass(batch["input_ids"])]

    def _pass(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        with torch.no_grad():
            out = self.model(tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache)
        return out.logits[:, -1]

    def say(self, token: int) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones(len(self.mask), 1, dtype=torch.long)], 1)
        self.logits.append(self._pass(torch.full((len(self.mask), 1), token)))
        return self.logits[-1]


def weights_by_hand(model, static: bool, weights: list[Tensor | float]) -> list[Tensor]:
    """The logits of a talk whose passes are steered by hand, with one weight for each."""
    talk = None
    for step, weight in enumerate(weights):
        with by_hand(model, torch.as_tensor(weight, dtype=torch.float32).reshape(-1, 1) if step else weight):
            if talk is None:
                talk = Talk(model, static)
            else:
                talk.say(20 + step)
    return talk.logits


PROMPT = padded("left")["attention_mask"]
NONE = torch.zeros_like(PROMPT, dtype=torch.float32)
LAST_TWO = NONE.clone()
LAST_TWO[:, -2:] = 1
FROM_FIVE = ((PROMPT.cumsum(1) - 1 >= 5) & PROMPT.bool()).float()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("scope", "weights", "steered"),
    [
        ("generated[:2]", [NONE, 1, 1, 0], 6),
        ("generated[1:]", [NONE, 0, 1, 1], 6),
        ("prompt[-2:]|generated[2]", [LAST_TWO, 0, 0, 1], 9),
        ("response~1", [NONE, 1, 0.5, 0.25], 9),
        ("positions[5:]!tokens[22]", [FROM_FIVE, [1, 0, 1], 0, 1], 8),
        ("role[assistant]&generated[:1]", [NONE, 1, 0, 0], 3),
    ],
)
def test_each_decoded_token_is_steered_as_it_should_be(scope, weights, steered, static, tiny):
    """Rows of 7, 4 and 6 prompt tokens; the second one reaches its fifth position with its second decoded token."""
    model = tiny("llama")
    by_hand_logits = weights_by_hand(model, static, weights)
    with plan_on(scope).attached(model) as attachment, chat_roles(model, torch.full_like(PROMPT, 1)):
        talk = Talk(model, static)
        for step in range(1, 4):
            talk.say(20 + step)
    for actual, expected in zip(talk.logits, by_hand_logits, strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)
    assert attachment.fired() == {NAME: steered}


@pytest.mark.parametrize("static", [False, True])
def test_two_generations_take_turns(static, tiny):
    model = tiny("llama")
    shorter = {name: tensor[:2, 2:] for name, tensor in padded("left", (5, 3)).items()}
    alone = []
    for batch in (None, shorter):
        with plan_on("generated[:2]").attached(model):
            talk = Talk(model, static, batch)
            alone.append([talk.logits[0], *(talk.say(9) for _ in range(3))])
    with plan_on("generated[:2]").attached(model):
        talks = [Talk(model, static), Talk(model, static, shorter)]
        for _ in range(3):
            for talk in talks:
                talk.say(9)
    for talk, expected in zip(talks, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(talk.logits, expected, strict=True))


@pytest.mark.parametrize("static", [False, True])
def test_a_copied_cache_goes_on_as_the_original(static, tiny):
    """Copying a cache continues one prompt in several ways."""
    model = tiny("llama")
    with plan_on("generated[1:2]").attached(model) as attachment:
        first = Talk(model, static)
        second = copy.deepcopy(first, {id(model): model})
        assert second.cache is not first.cache
        for token in (9, 10, 11):
            assert torch.equal(first.say(token), second.say(token))
    assert attachment.fired() == {NAME: 6}


@pytest.mark.parametrize("static", [False, True])
def test_a_plan_that_comes_after_the_prompt_says_so(static, tiny):
    model = tiny("llama")
    talk = Talk(model, static)
    with plan_on("generated[:2]").attached(model), pytest.raises(ContextError, match="prompt of this generation was not seen"):
        talk.say(9)
    talk = Talk(model, static)
    with plan_on("generated").attached(model) as attachment:  # needs to know nothing of the prompt
        talk.say(9)
    assert attachment.fired() == {NAME: 3}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("scope", "steered"), [("prompt", 2), ("generated[:2]", 4), ("positions[0]", 2), ("positions[-1]", 2)])
def test_prompts_of_one_token(scope, steered, cache, tiny):
    model = tiny("llama")
    with plan_on(scope).attached(model) as attachment:
        for turn in (1, 2):  # generate keeps the static cache and resets it
            model.generate(ids(2, 1), max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True)
            assert attachment.fired() == {NAME: turn * steered}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("scope", ["generated[1:3]~2", "prompt[-3:]!tokens[40,41,42,43]|role[system]"])
def test_beams_of_batched_rows_with_slots_equal_single_runs(scope, cache, tiny):
    model, batch = tiny("llama"), padded("left")
    vectors = torch.stack([3 * vector(seed=seed) for seed in range(3)])
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "num_beams": 2,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    roles = batch["input_ids"] % 4
    plan = Plan(Intervention(Add(vectors), "layers.1.output", scope))
    with plan.attached(model) as attachment, chat_roles(model, roles):
        attachment.set_rows([2, 0, 1])
        together = model.generate(**inputs, **options)
    for row, slot in enumerate([2, 0, 1]):
        single_row = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        with Plan(Intervention(Add(vectors[slot]), "layers.1.output", scope)).attached(model), chat_roles(model, roles[row : row + 1]):
            assert torch.equal(together[row], model.generate(**single_row, **options)[0])
    assert not torch.equal(together, model.generate(**inputs, **options))


# ---- training


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("site", ["layers.1.output", "layers.1.mlp.output"])
def test_gradients_of_windows_and_decay(checkpointing, site, tiny):
    """Sub-modules run a second time under checkpointing, and must select the same tokens then."""
    model, batch = tiny("llama").train(), padded("right")
    model.config.use_cache = False
    part = batch["labels"] != -100
    index = (part.cumsum(1) - 1).clamp_min(0)
    weight = torch.where(part & (index < 3), 0.5 ** (index / 2), 0.0)
    module = model.model.layers[1] if site == "layers.1.output" else model.model.layers[1].mlp
    with edited(module, lambda h: h + weight[..., None] * V):
        model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with Plan(Intervention(Add(V), site, "response[:3]~2")).attached(model):
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_turns_in_training(tiny, tiny_tokenizer):
    model = tiny("llama")
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "no no no"}]
    tokens, roles = (torch.tensor([part]) for part in encode_chat(tiny_tokenizer, turns))
    with by_hand(model, (roles == 1).float()):
        expected = model(tokens, use_cache=False).logits
    with plan_on("role[user]").attached(model) as attachment:
        with chat_roles(model, roles):
            assert torch.allclose(model(tokens, use_cache=False).logits, expected, atol=1e-5)
        with pytest.raises(ContextError, match="cannot tell whose turn"):  # only inside the block
            model(tokens, use_cache=False)
    assert attachment.fired() == {NAME: 2 + 4}


def test_windows_of_a_completion_by_a_response_mask(tiny):
    model = tiny("llama")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with plan_on("response[-2:]").attached(model) as attachment, response_tokens(model, mask):
        model(ids(2, 6), use_cache=False)
    assert attachment.fired() == {NAME: 4}


@pytest.mark.parametrize("scope", ["all", "response"])
def test_a_generation_takes_no_response_mask(scope, tiny):
    """The decoded text is longer than any response mask set for it."""
    model = tiny("llama")
    for width, decoding in ((6, True), (3, True), (9, False)):
        seen = 1 if decoding else 6
        with plan_on(scope).attached(model), response_tokens(model, torch.ones(2, width)):
            with pytest.raises(ContextError, match=rf"announced response mask[\s\S]*\[2, {seen}\][\s\S]*found: \[2, {width}\]"):
                model.generate(ids(2, 6), max_new_tokens=3, do_sample=False, pad_token_id=0)


# ---- windows that move while a plan is attached


def test_what_moved_is_steered_and_counted(tiny):
    model = tiny("llama")
    plan = Plan([Intervention(Add(V), f"layers.{layer}.output", "generated[:1]", name=str(layer)) for layer in range(3)])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with plan.attached(model) as attachment:
        model.generate(ids(2, 4), **options)
        assert attachment.fired() == {"0": 2, "1": 2, "2": 2}
        attachment.set_window(0, 3, "1")
        model.generate(ids(2, 4), **options)
        assert attachment.fired() == {"0": 4, "1": 8, "2": 4}
        attachment.set_window(2, 4)
        model.generate(ids(2, 4), **options)
        assert attachment.fired() == {"0": 8, "1": 12, "2": 8}


@pytest.mark.real
def test_a_turn_of_the_real_chat_template(smollm2):
    """The template has a system message of its own; the user's words are what is left of it."""
    model, tokenizer = smollm2
    turns = [{"role": "user", "content": "Name a colour."}]
    tokens, roles = (torch.tensor([part]) for part in encode_chat(tokenizer, turns, add_generation_prompt=True))
    said = [tokenizer.decode(tokens[roles == role]) for role in range(3)]
    assert said[0].startswith("<|im_start|>system") and said[0].endswith("<|im_end|>\n")
    assert said[1:] == ["<|im_start|>user\nName a colour.<|im_end|>\n", "<|im_start|>assistant\n"]
    width = model.config.hidden_size
    plan = Plan(Intervention(Add(torch.zeros(width)), "layers.9.output", "role[user]|generated[:2]", name="it"))
    with plan.attached(model) as attachment:
        with chat_roles(model, roles):
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert attachment.fired() == {"it": int((roles == 1).sum()) + 2}
