"""Capture: streams what the naive way would keep, stops early, and leaves the model as it was."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES
from hand import hook_count, ids, vector
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import ConfigError, ContrastError, NonFiniteError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model.accumulator import TextAccumulator, pool
from steer.model.anatomy import Anatomy
from steer.model.capture import batches, capture
from steer.model.site import Site
from steer.model.span import span_of
from steer.model.tokens import Row

SPANS = ["response", "prompt", "all", "last", "prompt_last", 0, 2, -1, -3]


class Pooled:
    """Mean activation of each text."""

    def __init__(self, texts: int) -> None:
        self.texts, self.rows = [None] * texts, []

    def update(self, h, weight, rows):
        self.rows.append(rows.tolist())
        for text, mean in zip(rows.tolist(), pool(h, weight), strict=True):
            assert self.texts[text] is None
            self.texts[text] = mean.clone()


def rows(count: int = 9) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    texts = []
    for text in range(count):
        size = int(torch.randint(4, 12, (), generator=generator))
        texts.append(Row(tuple(ids(1, size, text)[0].tolist()), int(torch.randint(1, size - 1, (), generator=generator))))
    return texts


def naive(model, row: Row, site: int, span) -> torch.Tensor:
    """Mean over the span of one unpadded text."""
    with torch.no_grad():
        states = model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False).hidden_states[site][0]
    states_by_span = {
        "response": states[row.prompt :],
        "prompt": states[: row.prompt],
        "all": states,
        "last": states[-1:],
        "prompt_last": states[row.prompt - 1 : row.prompt],
    }
    chosen = states_by_span[span] if isinstance(span, str) else states[span][None]
    return chosen.mean(0)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
def test_streaming_equals_keeping_everything(span, max_tokens, tiny):
    model, texts = tiny("llama"), rows()
    sites = {Site.parse("layers.0.output"): 1, Site.parse("layers.2.input"): 2, Site.parse("final_norm"): 3}
    means = {site: Pooled(len(texts)) for site in sites}
    capture(model, texts, dict(means), span=span, max_tokens=max_tokens)
    for site, index in sites.items():
        for text, row in enumerate(texts):
            assert torch.allclose(means[site].texts[text], naive(model, row, index, span), atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_with_padding(family, tiny):
    model, texts = tiny(family), rows(4)
    means = Pooled(4)
    capture(model, texts, {Site.parse("layers.1.output"): means})
    for text, row in enumerate(texts):
        assert torch.allclose(means.texts[text], naive(model, row, 2, "response"), atol=1e-4)


def calls(model) -> list[int]:
    seen = [0] * len(model.model.layers)

    def count(layer):
        def hook(*_):
            seen[layer] += 1

        return hook

    for layer, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(count(layer))
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["embed"], [0, 0, 0]),
        (["layers.0.output"], [1, 0, 0]),
        (["layers.2.input", "layers.0.attn.z"], [1, 1, 0]),
        (["layers.1.mlp.output", "layers.0.output"], [1, 1, 0]),
        (["final_norm"], [1, 1, 1]),
    ],
)
def test_the_forward_stops_after_the_deepest_site(sites, expected, tiny):
    model = tiny("llama")
    seen = calls(model)
    capture(model, rows(3), {Site.parse(site): Pooled(3) for site in sites})
    assert seen == expected  # and the unembedding never ran


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 100), st.sampled_from([1, 2]))
def test_batches_hold_every_text_once_and_keep_groups_together(lengths, max_tokens, group):
    lengths = lengths * group
    chosen = list(batches([Row((1,) * length, 1) for length in lengths], max_tokens, group))
    assert sorted(index for batch in chosen for index in batch) == list(range(len(lengths)))
    for batch in chosen:
        assert all(batch[i] + 1 == batch[i + 1] for i in range(0, len(batch), group) if group == 2)
        assert len(batch) == group or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    longest = [max(lengths[i] for i in batch) for batch in chosen]
    assert longest == sorted(longest, reverse=True)  # similar lengths together, the largest batch first


def test_the_model_is_left_as_it_was(tiny):
    model = tiny("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model(ids(), labels=ids()).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    means = Pooled(3)
    capture(model, rows(3), {Site.parse("layers.1.output"): means})
    assert [module.training for module in model.modules()] == modes and hook_count(model) == 0
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not means.texts[0].requires_grad
    model(ids(), labels=ids()).loss.backward()


def test_accumulators_see_nothing_left_and_right_of_every_span(tiny):
    class Shapes:
        def update(self, h, weight, rows):
            seen.append((list(h.shape[:2]), weight.tolist()))

    seen: list = []
    texts = [Row((5, 6, 7, 8, 9, 10), 4), Row((5, 6, 7, 8), 2)]
    for span in ("all", "response", "last"):
        capture(tiny("llama"), texts, {Site.parse("layers.1.output"): Shapes()}, span=span)
    assert seen == [
        ([2, 6], [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        ([2, 4], [[0, 0, 1, 1], [1, 1, 0, 0]]),
        ([2, 3], [[0, 0, 1], [1, 0, 0]]),
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_accumulator_that_fails_leaves_no_hook(error, tiny):
    class Fails:
        def update(self, h, weight, rows):
            raise error("mine")

    model = tiny("llama").train()
    with pytest.raises(error, match="mine"):
        capture(model, rows(3), {Site.parse("layers.1.output"): Fails()})
    assert hook_count(model) == 0 and model.training and torch.is_grad_enabled()
    model(ids())


def test_a_plan_stays_in_force_and_knows_the_response(tiny):
    model, texts = tiny("llama"), rows(4)
    plan = Plan([Intervention(Add(vector()), "layers.1.output", "response")])
    by_case = {}
    for span in ("prompt", "response"):
        for steered in (False, True):
            means = by_case[span, steered] = Pooled(4)
            if steered:
                with plan.attached(model):
                    capture(model, texts, {Site.parse("layers.1.output"): means}, span=span)
            else:
                capture(model, texts, {Site.parse("layers.1.output"): means}, span=span)
    for text in range(4):
        assert torch.equal(by_case["prompt", True].texts[text], by_case["prompt", False].texts[text])
        assert torch.allclose(by_case["response", True].texts[text], by_case["response", False].texts[text] + vector(), atol=1e-5)


def test_through_a_compiled_model_nothing_is_compiled(tiny):
    torch._dynamo.reset()
    graphs = []
    model = tiny("llama")
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph)
    means = Pooled(3)
    capture(compiled, rows(3), {Site.parse("layers.1.output"): means})
    assert not graphs and torch.allclose(means.texts[0], naive(model, rows(3)[0], 2, "response"), atol=1e-5)
    compiled(ids())
    assert graphs == [1]


def test_bfloat16_is_pooled_in_float32(tiny):
    model = tiny("llama").bfloat16()
    means = Pooled(3)
    capture(model, rows(3), {Site.parse("layers.1.output"): means})
    assert means.texts[0].dtype is torch.float32


def test_bad_input_is_named(tiny):
    model = tiny("llama")
    site = Site.parse("layers.1.output")
    with pytest.raises(ContrastError, match="no texts"):
        capture(model, [], {site: Pooled(0)})
    with pytest.raises(SiteError, match="out of range"):
        capture(model, rows(2), {Site.parse("layers.7.output"): Pooled(2)})
    with pytest.raises(SiteError, match="not hold one activation per token"):
        capture(model, rows(2), {Site.parse("module:model.rotary_emb:output"): Pooled(2)})
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="'layers.1.output' are not finite"):
        capture(model, rows(2), {site: Pooled(2)})
    assert hook_count(model) == 0


def test_spans_are_checked():
    texts = [Row((1, 2, 3, 4), 3), Row((1, 2), 2)]
    assert span_of(texts[0], "response") == (3, 4)
    assert [span_of(text, -2) for text in texts] == [(2, 3), (0, 1)]
    for span in ("response", 2, -3):
        with pytest.raises(ContrastError, match=rf"a text of 2 tokens \(0 of them response\) has no token in the span '{span}'"):
            span_of(texts[1], span)
    with pytest.raises(ConfigError, match=r"unknown span 'respons'[\s\S]*did you mean 'response'"):
        span_of(texts[0], "respons")


def chat(pairs: int = 8) -> list[Row]:
    """Pairs of answers to one prompt each, all of which begin alike."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for pair in range(pairs):
        prompt = (*range(20, 26), *ids(1, 5 + pair % 5, pair)[0].tolist())
        for side in range(2):
            size = int(torch.randint(2, 5, (), generator=generator))
            texts.append(Row((*prompt, 10 + side, *ids(1, size, 50 + 2 * pair + side)[0].tolist()), len(prompt)))
    return texts


def tokens_seen(model) -> list[tuple[int, ...]]:
    """The shape of what every pass embeds."""
    shapes: list[tuple[int, ...]] = []
    forward = model.get_input_embeddings().forward

    def counting(input_ids):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids)

    model.get_input_embeddings().forward = counting
    return shapes


@pytest.mark.parametrize("span", ["response", "last", "prompt_last", -2])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_prefixes_are_read_once(family, span, tiny):
    """Shared are the prompt of a pair and the common beginning of all prompts; every text gives the same as alone."""
    model, texts = tiny(family), chat()
    Anatomy.find(model)  # runs it once
    shapes = tokens_seen(model)
    pooled = Pooled(len(texts))
    capture(model, texts, {Site.parse("layers.1.output"): pooled}, span=span, group=2, max_tokens=100)
    read = sum(rows * tokens for rows, tokens in shapes[1:])  # after the texts that are read whole, to compare
    assert shapes[0] == (4, 16) and read < sum(len(row.ids) for row in texts)
    model.get_input_embeddings().__dict__.pop("forward")
    for text, row in enumerate(texts):
        assert torch.allclose(pooled.texts[text], naive(model, row, 2, span), atol=1e-4)


@pytest.mark.parametrize("reason", ["a span in the prompt", "a plan", "a hook", "no positions", "a model that reads its cache otherwise"])
def test_texts_run_whole_where_a_prefix_cannot_be_shared(reason, tiny):
    model, texts = tiny("llama"), chat()
    span = "prompt" if reason == "a span in the prompt" else "response"
    plan = Plan(Intervention(Add(vector()), "layers.0.output", "prompt[-2:]")) if reason == "a plan" else None
    if reason == "a hook":
        model.model.layers[0].register_forward_hook(lambda module, args, output: output + torch.arange(output.shape[1])[:, None])
    forward = model.forward
    if reason == "no positions":
        model.forward = lambda input_ids, attention_mask, use_cache=False: forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )
    if reason == "a model that reads its cache otherwise":
        model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    expected, shared = Pooled(len(texts)), Pooled(len(texts))
    with plan.attached(model) if plan is not None else nullcontext():
        capture(model, texts, {Site.parse("layers.1.output"): expected}, span=span)
        capture(model, texts, {Site.parse("layers.1.output"): shared}, span=span, group=2)
    for a, b in zip(expected.texts, shared.texts, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_numbers_of_texts_are_handed_over_when_a_batch_is_over(tiny):
    """No site makes the pass wait for the device: what all of them read comes after the last of them has run."""

    class Counted(TextAccumulator):
        def reduce(self, h, weight):
            events.append("reduce")
            return pool(h, weight)

        def add(self, values, rows):
            assert values.shape == (len(rows), 32) and values.device.type == "cpu"
            events.append("add")

    events: list[str] = []
    capture(tiny("llama"), rows(4), {Site.parse(f"layers.{layer}.output"): Counted() for layer in range(3)})
    assert events == ["reduce"] * 3 + ["add"] * 3
