"""Tokens of the steered stack where arguments around it speak of others: an encoder's mask, soft prompts, images, packed requests."""

from collections.abc import Callable

import pytest
import torch
import transformers
from hand import edited, ids, padded, vector
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan, ProbeGate
from steer.model.annotations import chat_roles

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def plan_of(scope: str = "all", strength: float = 2.0, **options) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.1.output", scope=scope, strength=strength, **options))


def shifted(mask: Tensor | float) -> Callable[[Tensor], Tensor]:
    """What `plan_of` does on the tokens of a mask, [batch, tokens], by hand."""
    return lambda h: h + 2.0 * (mask.unsqueeze(-1).to(h.dtype) if isinstance(mask, Tensor) else mask) * vector()


# ---- encoder-decoders


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 3), ("attention_heads", 4))}
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, decoder_start_token_id=2, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("n_targets", [5, 7])  # the second as long as the source, so that no length tells the masks apart
@pytest.mark.parametrize("scope", ["all", "response", "last"])
def test_the_mask_of_an_encoder_is_not_the_decoders(scope, n_targets):
    model = bart()
    source = padded("right", lengths=(7, 4))
    batch = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": ids(2, n_targets, seed=5)}
    expected = torch.zeros(2, n_targets)
    expected[:, -1 if scope == "last" else slice(None)] = 1
    with edited(model.model.decoder.layers[1], shifted(expected)):
        by_hand = model(**batch).logits
    with plan_of(scope).attached(model) as attachment:
        logits = model(**batch).logits
    assert attachment.fired() == {"add@layers.1.output": expected.sum()}
    torch.testing.assert_close(logits, by_hand)


def test_a_padded_decoder_says_so_itself():
    model = bart()
    source, target = padded("right", lengths=(7, 4)), padded("right", lengths=(3, 5))
    with plan_of().attached(model) as attachment, torch.no_grad():
        model(
            input_ids=source["input_ids"],
            attention_mask=source["attention_mask"],
            decoder_input_ids=target["input_ids"],
            decoder_attention_mask=target["attention_mask"],
        )
    assert attachment.fired() == {"add@layers.1.output": 8}


@pytest.mark.parametrize(("scope", "n_steered"), [("all", 10), ("generated", 8), ("prompt", 2)])
def test_generation_of_an_encoder_decoder(scope, n_steered):
    source = padded("right", lengths=(7, 4))
    with plan_of(scope).attached(model := bart()) as attachment:
        model.generate(source["input_ids"], attention_mask=source["attention_mask"], **GREEDY)
    assert attachment.fired() == {"add@layers.1.output": n_steered}  # the start token is the prompt


def test_ids_of_an_encoder_are_not_the_decoders():
    model = bart()
    batch = {"input_ids": ids(2, 5), "decoder_inputs_embeds": torch.randn(2, 5, 32)}
    with plan_of("tokens[7]").attached(model), pytest.raises(ContextError, match="needs token ids"):
        model(**batch)


# ---- masks


@pytest.mark.parametrize("position_ids", [False, True])
def test_a_mask_with_holes_has_one_last_token(position_ids, tiny):
    batch = {"input_ids": ids(2, 7), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 1]])}
    if position_ids:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = {"last": [[4], [6]], "positions[-2:]": [[3, 4], [3, 6]], "positions[1]": [[1], [2]]}
    for scope, columns in expected.items():
        steered = torch.zeros(2, 7)
        for row, chosen in enumerate(columns):
            steered[row, chosen] = 1
        model = tiny("llama")
        with edited(model.model.layers[1], shifted(steered)), torch.no_grad():
            by_hand = model(**batch).logits
        with plan_of(scope).attached(model), torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, by_hand)


def test_the_last_tokens_of_packed_texts_that_end_in_padding(tiny):
    batch = {
        "input_ids": ids(1, 8),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 1, 0, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    with plan_of("last").attached(model := tiny("llama")) as attachment, torch.no_grad():
        model(**batch)
    assert attachment.fired() == {"add@layers.1.output": 2}  # columns 2 and 6


@pytest.mark.parametrize("shape", [(3, 7), (2, 5)])
def test_the_mask_of_other_tokens_is_refused(shape, tiny):
    with plan_of().attached(model := tiny("llama")), pytest.raises(ContextError, match="attention mask is not that"):
        model(input_ids=ids(2, 7), attention_mask=torch.ones(shape, dtype=torch.long))


def test_positions_that_no_argument_tells_are_refused(tiny):
    model = tiny("llama")
    batch = padded("left")
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & batch["attention_mask"][:, None, None].bool()  # [batch, 1, 7, 7]
    with plan_of("positions[0]").attached(model), pytest.raises(ContextError, match="positions cannot be told"):
        model(input_ids=batch["input_ids"], attention_mask=causal)


# ---- soft prompts

N_VIRTUAL = 3
SOFT_PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL, encoder_hidden_size=8),
}


def soft_prompted(tiny, how: str = "prompt tuning") -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), SOFT_PROMPTS[how]).eval()


@pytest.mark.parametrize("how", [*SOFT_PROMPTS, "lora"])
@pytest.mark.parametrize("roles", [("policy",), ("policy", "reference")])
def test_the_reference_of_any_adapter_is_known(how, roles, tiny):
    base = tiny("llama")
    with edited(base.model.layers[1], shifted(float("reference" in roles))), torch.no_grad():
        expected = base(ids()).logits
    peft = soft_prompted(tiny, how) if how in SOFT_PROMPTS else get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with plan_of(roles=roles).attached(peft), torch.no_grad(), peft.disable_adapter():
        torch.testing.assert_close(peft(input_ids=ids()).logits, expected)


def test_a_forward_that_something_else_wrapped_is_no_reference(tiny):
    peft = soft_prompted(tiny)
    peft.forward = torch.no_grad()(peft.forward)  # as mixed precision does
    with plan_of().attached(peft) as attachment:
        peft(input_ids=ids())
    assert attachment.fired() == {"add@layers.1.output": 2 * (7 + N_VIRTUAL)}


@pytest.mark.parametrize("how", SOFT_PROMPTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["last", "positions[0]", "positions[-2:]", "positions[:99]", "prompt", "response[0]", "role[user]"])
def test_scopes_count_the_tokens_of_the_text_behind_a_soft_prompt(scope, side, how, tiny):
    batch = padded(side)
    real = batch["attention_mask"].bool()
    index = real.cumsum(1) - 1
    from_end = index - index.amax(1, keepdim=True) - 1
    masks = {
        "last": from_end == -1,
        "positions[0]": index == 0,
        "positions[-2:]": from_end >= -2,
        "positions[:99]": real,
        "prompt": batch["labels"] == -100,
        "response[0]": index == 2,
        "role[user]": index < 2,
    }
    expected = torch.nn.functional.pad(masks[scope] & real, (N_VIRTUAL, 0))
    roles = torch.where(index < 2, 1, 2)
    model = soft_prompted(tiny, how)
    with edited(model.base_model.model.layers[1], shifted(expected)), torch.no_grad():
        by_hand = model(**batch).logits
    with plan_of(scope).attached(model) as attachment, torch.no_grad(), chat_roles(model, roles):
        torch.testing.assert_close(model(**batch).logits, by_hand)
    assert attachment.fired() == {"add@layers.1.output": expected.sum()}


def test_ids_behind_a_soft_prompt(tiny):
    model, batch = soft_prompted(tiny), padded("left")
    token = int(batch["input_ids"][0, 3])
    expected = torch.nn.functional.pad(batch["input_ids"] == token, (N_VIRTUAL, 0))
    with edited(model.base_model.model.layers[1], shifted(expected)), torch.no_grad():
        by_hand = model(**batch).logits
    with plan_of(f"tokens[{token}]").attached(model), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, by_hand)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated[1:]", "positions[4:6]", "last", "prompt[-1]", "generated~2"])
def test_generation_behind_a_soft_prompt_counts_as_training_does(scope, tiny):
    """Every token decoded with a cache is the one that a pass over the whole text gives."""
    batch = padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model = soft_prompted(tiny)
    with plan_of(scope).attached(model) as attachment:
        text = model.generate(**inputs, **GREEDY)
    lengths = inputs["attention_mask"].sum(1)
    n_decoded = 4 * len(lengths)  # the fifth token is never an input
    n_steered = {
        "all": int(lengths.sum()) + N_VIRTUAL * len(lengths) + n_decoded,
        "prompt": int(lengths.sum()),
        "generated[1:]": 3 * len(lengths),
        "positions[4:6]": 2 * len(lengths),
        "last": len(lengths) + n_decoded,
        "prompt[-1]": len(lengths),
        "generated~2": n_decoded,
    }
    if scope != "generated~2":
        assert attachment.fired() == {"add@layers.1.output": n_steered[scope]}
    steered = {"all": 1.0, "generated~2": None}.get(scope, 0)
    if steered == 1.0:
        with edited(model.base_model.model.layers[1], shifted(1.0)):
            assert torch.equal(model.generate(**inputs, **GREEDY), text)


# ---- images


def smolvlm() -> nn.Module:
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=90, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("scope", "columns"), [("all!tokens[90]", [0, 1, 6, 7, 8, 9]), ("image", [2, 3, 4, 5]), ("tokens[13,90]", [2, 3, 4, 5, 6])]
)
def test_ids_are_known_where_images_are_merged_into_the_text(scope, columns):
    model = smolvlm()
    batch = {"input_ids": torch.tensor([[11, 12, 90, 90, 90, 90, 13, 14, 15, 16]]), "pixel_values": torch.randn(1, 1, 3, 16, 16)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = torch.zeros(1, 10)
    expected[:, columns] = 1
    with edited(model.model.text_model.layers[1], shifted(expected)), torch.no_grad():
        by_hand = model(**batch).logits
    with plan_of(scope).attached(model) as attachment, torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, by_hand)
        assert attachment.fired() == {"add@layers.1.output": len(columns)}
        model.generate(**batch, **GREEDY)
    assert attachment.fired()["add@layers.1.output"] >= 2 * len(columns)


@pytest.mark.parametrize("where", ["scope", "gate"])
def test_images_need_a_model_that_reads_them(where, tiny):
    plan = plan_of("image") if where == "scope" else plan_of(gate=ProbeGate(vector(), per="row", over="image"))
    with pytest.raises(ContextError, match="vision-language model"):
        plan.attach(tiny("llama"))


# ---- continuous batching and assisted decoding

PROMPTS = [[11, 12, 13], [21, 22, 23, 24, 25], [31, 32]]


def lively(model: nn.Module) -> nn.Module:
    """With larger weights, so that an edit of one token changes what follows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batched(model: nn.Module) -> list[GenerationOutput]:
    settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    answers = model.generate_batch(inputs=PROMPTS, generation_config=settings, progress_bar=False, continuous_batching_config=config)
    return [answers[key] for key in sorted(answers)]


def together(model: nn.Module) -> list[list[int]]:
    return [answer.generated_tokens for answer in batched(model)]


def alone(model: nn.Module) -> list[list[int]]:
    return [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [{}, {"phases": ("generate",)}, {"scope": "tokens[12,24]"}, {"gate": ProbeGate(vector(seed=3))}],
)
def test_continuous_batching_is_steered_as_each_prompt_alone(options, tiny):
    model = lively(tiny("llama"))
    answers, counts = [], []
    for run in (together, alone):
        with plan_of(**options).attached(model) as attachment:
            answers.append(run(model))
        counts.append(attachment.fired())
    assert answers[0] == answers[1] != alone(model)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "options",
    [{"scope": scope} for scope in ("last", "prompt", "generated", "positions[0]", "all~4")]
    + [{"gate": ProbeGate(vector(), per=per, over="all")} for per in ("row", "generation")],
)
def test_what_continuous_batching_mixes_up_is_refused(options, tiny):
    model = tiny("llama").eval()
    with plan_of(**options).attached(model) as attachment:
        answers = batched(model)  # transformers catches what is raised in its thread, and says it in each answer
    assert all("continuous batching" in answer.error and not answer.generated_tokens for answer in answers)
    assert sum(attachment.fired().values()) == 0
    with plan_of().attached(model):
        together(model)


def test_a_prompt_after_continuous_batching_is_as_clear_as_before(tiny):
    model = tiny("llama").eval()
    with plan_of().attached(model):
        together(model)
        with plan_of("last").attached(model, stack=True) as attachment, torch.no_grad():
            model(ids(), use_cache=True)
    assert attachment.fired() == {"add@layers.1.output": 2}


class CalledCache(transformers.LlamaModel):
    """With the name that the cache has in transformers from 5.24 on."""

    def forward(self, input_ids: Tensor, cache: transformers.DynamicCache | None = None) -> Tensor:
        return super().forward(input_ids, past_key_values=cache).last_hidden_state


@pytest.mark.parametrize("by_place", [False, True])
def test_a_cache_of_another_name(by_place, tiny):
    model = CalledCache(tiny("llama").config).eval()
    cache = transformers.DynamicCache()
    with plan_of("generated").attached(model) as attachment, torch.no_grad():
        for tokens in (7, 1, 1):
            _ = model(ids(2, tokens), cache) if by_place else model(ids(2, tokens), cache=cache)
    assert attachment.fired() == {"add@layers.1.output": 4}


def test_an_assisted_generation_that_ends_in_its_first_pass_is_refused(tiny):
    model = tiny("llama").eval()
    text = torch.tensor([[5, 9, 11, 4, 5, 9, 11, 4, 5, 9]])
    with plan_of("last").attached(model) as attachment:
        with pytest.raises(ContextError, match="cannot be told apart"):
            model.generate(text, prompt_lookup_num_tokens=2, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert attachment.passes == 0
        model(text)
