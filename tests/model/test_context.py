"""What a forward pass says about its tokens: phases, roles, prompt, response, padding, packing, caches, beams."""

import pytest
import torch
from hand import edited, ids, packed, padded, vector
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, StaticCache

from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan
from steer.model import context
from steer.model.annotations import chat_roles, response_tokens
from steer.model.watcher import watcher_of


class Trace:
    """Every context of an attached model, in order."""

    def __init__(self, model: nn.Module, scope: str = "all", **options) -> None:
        self.model, self.plan = model, Plan(Intervention(Add(vector()), "layers.1.output", scope=scope, **options))
        self.contexts: list[context.ForwardContext] = []
        self.tokens: list[list[list[int]]] = []

    def __enter__(self):
        self.attachment = self.plan.attach(self.model)
        watcher_of(self.model).on_close.append(self._note)
        return self

    def _note(self, ctx: context.ForwardContext) -> None:
        mask = self.attachment.interventions[0].tokens(ctx)
        mask = torch.as_tensor(mask).expand(ctx.batch, ctx.tokens) if isinstance(mask, bool) else mask
        self.contexts.append(ctx)
        self.tokens.append(mask.int().tolist())

    def __exit__(self, *_):
        watcher_of(self.model).on_close.remove(self._note)
        self.attachment.detach()

    @property
    def phases(self) -> list[str]:
        return [ctx.phase for ctx in self.contexts]


GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_touched(side, tiny):
    batch = padded(side)
    with Trace(tiny("llama")) as trace, torch.no_grad():
        trace.model(**batch, use_cache=False)
    assert trace.tokens == [batch["attention_mask"].tolist()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["prompt", "response"])
def test_labels_say_what_is_prompt_and_response(side, scope, tiny):
    batch = padded(side)
    response = batch["labels"] != -100
    expected = response if scope == "response" else batch["attention_mask"].bool() & ~response
    with Trace(tiny("llama"), scope) as trace:
        trace.model(**batch)
    assert trace.tokens == [expected.int().tolist()] and trace.phases == ["train"]


def test_the_phase_never_comes_from_the_training_mode(tiny):
    model = tiny("llama")
    for mode in (True, False):
        model.train(mode)
        with Trace(model) as trace:
            model(ids(), labels=ids())
            with torch.no_grad():
                model(ids(), labels=ids())
                model(ids(), use_cache=False)
                model(ids(), use_cache=True)
        assert trace.phases == ["train", "validate", "validate", "generate"]


@pytest.mark.parametrize("training", [True, False])
def test_generation_with_a_growing_cache(training, tiny):
    """GRPO generates in training mode."""
    model = tiny("llama").train(training)
    batch = padded("left")
    with Trace(model, "generated") as trace:
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GENERATE)
    assert trace.phases == ["generate"] * 4
    assert [ctx.decoding for ctx in trace.contexts] == [False, True, True, True]
    assert trace.tokens == [[[0] * 7] * 3] + [[[1]] * 3] * 3
    assert trace.attachment.fired() == {"add@layers.1.output": 9}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "falcon"])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "last", "positions[0,2]", "positions[-1,5]"])
@pytest.mark.parametrize("tokens", [5, 1])
def test_a_static_cache_says_the_same_as_a_growing_one(family, scope, tokens, tiny):
    """Static caches pass 4-D masks (per kind of layer), count in place, and tell their length as a tensor."""
    model = tiny(family)
    batch = padded("left", lengths=(tokens, max(tokens - 2, 1)))
    by_cache = {}
    for kind in ("dynamic", "static"):
        with Trace(model, scope) as trace:
            text = model.generate(
                batch["input_ids"], attention_mask=batch["attention_mask"], cache_implementation=kind, disable_compile=True, **GENERATE
            )
        by_cache[kind] = (text.tolist(), trace.tokens, trace.attachment.fired())
    assert by_cache["static"] == by_cache["dynamic"]


def test_a_static_cache_that_was_set_up_early(tiny):
    """The cache's length is a tensor already at the prefill; a prompt of one token is still not a decoded token."""
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    with Trace(model, "generated") as generated, torch.no_grad():
        model(ids(1, 1), past_key_values=cache, use_cache=True)
        model(ids(1, 1), past_key_values=cache, use_cache=True)
    assert generated.tokens == [[[0]], [[1]]]


def test_a_custom_loop(tiny):
    model = tiny("llama")
    seen = {}
    for scope in ("prompt", "generated", "positions[4,6]", "positions[-2]"):
        with Trace(model, scope) as trace, torch.no_grad():
            output = model(ids(2, 5), use_cache=True)
            for step in range(3):
                output = model(ids(2, 1, step), past_key_values=output.past_key_values)
        seen[scope] = [rows[0] for rows in trace.tokens]
    assert seen["prompt"] == [[1] * 5, [0], [0], [0]]
    assert seen["generated"] == [[0] * 5, [1], [1], [1]]
    assert seen["positions[4,6]"] == [[0, 0, 0, 0, 1], [0], [1], [0]]
    assert seen["positions[-2]"] == [[0, 0, 0, 1, 0], [0], [0], [0]]


def test_beams_and_returned_sequences(tiny):
    model = tiny("llama")
    batch = padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with Trace(model) as trace:
        model.generate(**inputs, num_beams=2, **GENERATE)
        beams = trace.contexts[1].batch
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert beams == 6 and trace.contexts[-1].batch == 9
    assert trace.tokens[-2] == batch["attention_mask"].repeat_interleave(3, 0).tolist()


def test_without_a_cache_generated_tokens_cannot_be_told_and_that_is_said(tiny):
    model = tiny("llama")
    inputs = {"attention_mask": torch.ones(2, 7), **GENERATE, "use_cache": False}
    for scope in ("prompt", "response", "generated"):
        with Trace(model, scope), pytest.raises(ContextError, match=r"cannot tell prompt from response[\s\S]*use_cache=False"):
            model.generate(ids(), **inputs)
    with Trace(model, "all") as trace:
        model.generate(ids(), **inputs)
    assert trace.phases == ["validate"] * 4 and len(trace.tokens[-1][0]) == 10


def test_packed_rows(tiny):
    batch = packed((4, 3, 5))
    for scope, expected in {
        "last": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1],
        "positions[0,2]": [1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0],
        "positions[-2]": [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        "prompt": [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
    }.items():
        with Trace(tiny("llama"), scope) as trace:
            trace.model(**batch)
        assert trace.tokens == [[expected]], scope


def test_a_response_mask_stands_in_for_labels(tiny):
    model = tiny("llama")
    batch = padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    response = batch["labels"] != -100
    narrow = torch.ones(3, 3, dtype=torch.long)
    narrow[1, 2] = 0
    with Trace(model, "response") as trace:
        for mask in (response, response.long(), batch["labels"], response.float()):
            with response_tokens(model, mask):
                model(**inputs)
        with response_tokens(model, narrow):  # GRPO: the completion's mask only
            model(**inputs)
        with pytest.raises(ContextError, match="cannot tell"):
            model(**inputs)
    assert trace.tokens[:4] == [response.int().tolist()] * 4
    assert trace.tokens[4] == [[0, 0, 0, 0, *row] for row in narrow.tolist()]


def test_a_response_mask_that_does_not_fit_is_refused(tiny):
    model = tiny("llama")
    with Trace(model, "response"):
        for mask in (torch.ones(3, 7), torch.ones(2, 8)):
            with response_tokens(model, mask), pytest.raises(ContextError, match=r"does not fit[\s\S]*\[2, 7\]"):
                model(ids(), use_cache=False)
        with response_tokens(model, torch.ones(2, 7)):
            model(ids(), use_cache=False)
    with response_tokens(model, torch.ones(2, 7)):  # nothing is attached: nothing to tell
        model(ids())


def test_response_masks_nest_and_end_with_their_block(tiny):
    model = tiny("llama")
    with Trace(model, "response") as trace:
        with response_tokens(model, torch.ones(2, 7)):
            with response_tokens(model, torch.zeros(2, 7)):
                model(ids(), use_cache=False)
            model(ids(), use_cache=False)
        with pytest.raises(RuntimeError, match="stop"), response_tokens(model, torch.ones(2, 7)):
            raise RuntimeError("stop")
        assert watcher_of(model).response is None
    assert [sum(map(sum, rows)) for rows in trace.tokens] == [0, 14]


@pytest.mark.parametrize("scope", ["response", "role[assistant]"])
def test_what_is_attached_inside_the_block_is_told_too(scope, tiny):
    model, mask = tiny("llama"), torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    with response_tokens(model, mask), chat_roles(model, 2 * mask):
        for _ in range(2):  # the second time with another watcher
            with Trace(model, scope) as trace:
                model(ids(), use_cache=False)
                with response_tokens(model, 1 - mask), chat_roles(model, 2 - 2 * mask):
                    model(ids(), use_cache=False)
                model(ids(), use_cache=False)
            assert trace.tokens == [part.tolist() for part in (mask, 1 - mask, mask)]
    with Trace(model, scope), pytest.raises(ContextError):  # only inside the block
        model(ids(), use_cache=False)


def adapted(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options))


def dpo_step(peft, batch):
    """Policy pass, then the reference pass on the same rows with the adapters off, in training mode."""
    policy = peft(**batch).logits
    with torch.no_grad(), peft.disable_adapter():
        reference = peft(**batch).logits
    return policy, reference


def test_dpo_leaves_the_reference_pass_alone(tiny):
    peft = adapted(tiny("llama")).train()
    batch = padded("right")
    _, plain = dpo_step(peft, batch)
    with Trace(peft, "response") as trace:
        policy, reference = dpo_step(peft, batch)
    assert [ctx.role for ctx in trace.contexts] == ["policy", "reference"] and trace.phases == ["train", "validate"]
    assert torch.equal(reference, plain)
    with edited(peft.base_model.model.model.layers[1], lambda h: h + (batch["labels"] != -100).unsqueeze(-1) * vector()):
        assert torch.allclose(policy, peft(**batch).logits, atol=1e-6)


def test_the_reference_pass_is_steered_when_the_plan_says_so(tiny):
    peft = adapted(tiny("llama")).train()
    batch = padded("right")
    _, plain = dpo_step(peft, batch)
    with Trace(peft, roles=("policy", "reference")):
        _, reference = dpo_step(peft, batch)
    with Trace(peft, roles="reference") as only:
        dpo_step(peft, batch)
    assert not torch.allclose(reference, plain, atol=1e-3)
    assert [any(map(sum, rows)) for rows in only.tokens] == [False, True]


def test_a_copy_of_the_first_adapter_is_the_reference_too(tiny):
    """TRL continues a trained adapter against a frozen copy of it called `ref`."""
    peft = adapted(tiny("llama"))
    peft.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    with Trace(peft) as trace, torch.no_grad():
        peft(ids())
        peft.set_adapter("ref")
        peft(ids())
        peft.set_adapter("default")
        peft(ids())
    assert [ctx.role for ctx in trace.contexts] == ["policy", "reference", "policy"]


def test_generating_with_adapters_off_is_generation(tiny):
    peft = adapted(tiny("llama"))
    with Trace(peft) as trace, peft.disable_adapter():
        peft.generate(input_ids=ids(), **GENERATE)
    assert {(ctx.phase, ctx.role) for ctx in trace.contexts} == {("generate", "policy")}


def test_a_grpo_step(tiny):
    """Generation in training mode, a pass for the old log-probabilities, the reference pass, the policy pass with gradients."""
    peft = adapted(tiny("llama")).train()
    mask = torch.ones(2, 4)
    with Trace(peft, "response") as trace:
        with torch.no_grad():
            text = peft.generate(input_ids=ids(2, 3), **GENERATE)
        with response_tokens(peft, mask):
            with torch.no_grad():
                peft(text, use_cache=False, logits_to_keep=5)
                with peft.disable_adapter():
                    peft(text, use_cache=False, logits_to_keep=5)
            peft(text, use_cache=False, logits_to_keep=5)
    assert trace.phases == ["generate"] * 4 + ["validate", "validate", "train"]
    assert [ctx.role for ctx in trace.contexts][4:] == ["policy", "reference", "policy"]
    assert trace.tokens[-1] == [[0, 0, 0, 1, 1, 1, 1]] * 2 and trace.tokens[-2] == [[0] * 7] * 2


def test_prompt_tuning_adds_tokens(tiny):
    peft = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    batch = padded("right")
    with Trace(peft, "response") as trace:
        peft(**batch)
    expected = torch.nn.functional.pad(batch["labels"] != -100, (2, 0))
    assert trace.tokens == [expected.int().tolist()]


def test_inputs_embeds_and_positional_arguments(tiny):
    model = tiny("llama")
    batch = padded("left")
    with Trace(model) as trace, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"])
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), attention_mask=batch["attention_mask"])
    assert trace.tokens == [batch["attention_mask"].tolist()] * 2


def test_a_classifiers_labels_are_not_tokens(tiny):
    model = AutoModelForSequenceClassification.from_config(tiny("llama").config)
    with Trace(model, "response"), pytest.raises(ContextError, match="cannot tell"):
        model(ids(), labels=torch.tensor([0, 1]))
    with Trace(model) as trace:
        model(ids(), labels=torch.tensor([0, 1]))
    assert trace.tokens == [[[1] * 7] * 2]


@pytest.mark.parametrize("where", ["block", "head", "before"])
def test_a_failed_pass_leaves_nothing_to_the_next_one(where, tiny):
    """Labels and masks of a pass that raised must not be taken for those of the next, whichever module it starts from."""
    model = tiny("llama")
    broken = {"block": model.model.layers[2], "head": model.lm_head, "before": model.model.embed_tokens}[where]
    with Trace(model, "all") as trace:
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**padded("left"))
        handle.remove()
        model.model(ids(2, 3), use_cache=False)
        model(ids(2, 3), use_cache=False)
    assert [ctx.labelled for ctx in trace.contexts[-2:]] == [None, None]
    assert trace.tokens[-2:] == [[[1] * 3] * 2] * 2


def test_a_site_outside_a_pass_is_an_error(tiny):
    model = tiny("llama")
    with Trace(model), pytest.raises(ContextError, match="outside a forward pass"):
        model.model.layers[1](torch.zeros(1, 2, 32), position_embeddings=(torch.zeros(1, 2, 8),) * 2)


@pytest.mark.parametrize("keep", [0, 3, torch.tensor([1, 4])])
def test_the_unembedding_may_get_some_tokens_only(keep, tiny):
    model = tiny("llama")
    batch = padded("right")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False, "logits_to_keep": keep}
    response = (batch["labels"] != -100).unsqueeze(-1)
    response = response[:, keep] if isinstance(keep, torch.Tensor) else response[:, -keep:]
    with torch.no_grad():
        plain = model(**inputs).logits
        with Plan(Intervention(Add(vector(96)), "logits", scope="response")).attached(model), response_tokens(model, batch["labels"]):
            steered = model(**inputs).logits
    assert torch.allclose(steered - plain, response * vector(96), atol=1e-5)


def test_generation_is_steered_at_the_unembedding(tiny):
    model = tiny("llama")
    push = torch.zeros(96)
    push[42] = 1e4
    with Plan(Intervention(Add(push), "logits", scope="generated")).attached(model):
        text = model.generate(ids(), attention_mask=torch.ones(2, 7), **GENERATE)
    assert (text[:, 8:] == 42).all() and (text[:, 7] != 42).any()
