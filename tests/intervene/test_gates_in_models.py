"""Gates in models: every row, call, cache and model decides for itself, by the activation that the gate names."""

import copy

import pytest
import torch
from hand import edited, ids, packed, padded, recorded, vector
from transformers import DynamicCache

from steer.intervene import Add, CallGate, Intervention, Plan, ProbeGate
from steer.intervene.gate import Gate
from steer.model.anatomy import Anatomy

SITE, READ = "layers.1.output", "layers.0.output"
V, W = vector(seed=1), vector(seed=2)


def gated(gate: Gate, scope: str = "all", **options) -> Plan:
    return Plan(Intervention(Add(V), SITE, scope, gate=gate, **options))


# ---- rows


def split(values: torch.Tensor) -> float:
    """A threshold that parts the values in two."""
    ordered = values.flatten().sort().values
    middle = len(ordered) // 2
    return float(ordered[middle - 1 : middle + 1].mean())


def pooled_prompt(model, batch, site: str = READ) -> torch.Tensor:
    """[batch]: mean over the real tokens of h·W, without a plan."""
    with torch.no_grad(), recorded(model, [site]) as seen:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions(batch))
    real = batch["attention_mask"]
    return (seen[site] @ W * real).sum(1) / real.sum(1)


def positions(batch) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


def per_generation(model, batch, per: str = "generation", **options) -> tuple[Plan, torch.Tensor]:
    """A plan whose gate opens for some rows of a batch, and which those are."""
    margins = pooled_prompt(model, batch)
    opened = margins > split(margins)
    assert 0 < opened.sum() < len(opened)
    return gated(ProbeGate(W, -split(margins), site=READ, per=per, **options)), opened


def generate(model, batch, **options) -> torch.Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_a_batch_decides_for_itself(side, tiny):
    model, batch = tiny("llama"), padded(side, (7, 4, 6, 5))
    for per in ("row", "generation"):
        plan, opened = per_generation(model, batch, per=per, over="all")
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | {"position_ids": positions(batch)}
        with torch.no_grad():
            with plan.attached(model) as attachment:
                actual = model(**inputs).logits
            with edited(model.model.layers[1], lambda h, o=opened: h + o[:, None, None] * V):
                expected = model(**inputs).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(actual[real], expected[real], atol=1e-5)
        assert attachment.fired() == {"add@layers.1.output": int(real[opened].sum())}


def test_packed_texts_decide_for_themselves(tiny):
    model, batch = tiny("llama"), packed((4, 3, 5, 2), prompt=2)
    text = (batch["position_ids"] == 0).cumsum(1) - 1
    with torch.no_grad(), recorded(model, [READ]) as seen:
        model(**batch)
    margin, prompt = seen[READ] @ W, batch["labels"] == -100
    for pool, reduce in (("mean", "mean"), ("max", "amax")):
        pooled = torch.zeros(1, 4).scatter_reduce(1, text[prompt][None], margin[prompt][None], reduce, include_self=False)
        threshold = split(pooled)
        plan = gated(ProbeGate(W, -threshold, site=READ, per="row", pool=pool), "response")
        expected = (pooled > threshold).gather(1, text) & ~prompt
        assert 0 < expected.sum() < (~prompt).sum()
        with torch.no_grad():
            with plan.attached(model) as attachment:
                actual = model(**batch).logits
            with edited(model.model.layers[1], lambda h, w=expected: h + w.unsqueeze(-1) * V):
                assert torch.allclose(actual, model(**batch).logits, atol=1e-5)
        assert attachment.fired() == {"add@layers.1.output": int(expected.sum())}


MODES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_prompt_decides_holds_for_its_generation(family, mode, tiny):
    """Open rows equal a generation with the ungated plan, closed rows one without the plan, each as if generated alone."""
    model, batch = tiny(family), padded("left", (7, 4, 6, 5))
    plan, opened = per_generation(model, batch)
    with plan.attached(model) as attachment:
        attachment.set_strength(8.0)
        generated = generate(model, batch, **MODES[mode])
    ungated = Plan(Intervention(Add(V), SITE, strength=8.0))
    rows = len(generated) // 4
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        plain = generate(model, alone, **MODES[mode])
        with ungated.attached(model):
            steered = generate(model, alone, **MODES[mode])
        assert not torch.equal(steered, plain)
        assert torch.equal(generated[row * rows : (row + 1) * rows], steered if opened[row] else plain)


def test_nothing_is_left_of_an_open_gate_in_the_next_call(tiny):
    """CAST keeps its decision in the class: a threshold that nothing exceeds would still steer the next prompt."""
    model, batch = tiny("llama"), padded("left")
    plain = generate(model, batch)
    for per in ("token", "row", "generation"):
        plan = gated(ProbeGate(torch.zeros(32), 1.0, per=per))
        with plan.attached(model) as attachment:
            assert not torch.equal(generate(model, batch), plain)
            before = attachment.fired()
            plan.interventions[0].gate.tensors["bias"].fill_(-1e9)
            assert torch.equal(generate(model, batch), plain)
            assert attachment.fired() == before


def step(model, cache, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits[:, -1]


def test_two_generations_in_turns_and_a_copied_cache(tiny):
    model = tiny("llama")
    prompts = {name: {"input_ids": ids(2, 5, seed), "attention_mask": torch.ones(2, 5).long()} for name, seed in (("a", 1), ("b", 5))}
    margins = torch.cat([pooled_prompt(model, prompt) for prompt in prompts.values()])
    new = ids(2, 4, 9)
    gate = ProbeGate(W, -split(margins), site=READ, per="generation")

    def decode(order: str) -> dict[str, list[torch.Tensor]]:
        caches, logits = {name: DynamicCache() for name in prompts}, {"a": [], "b": [], "c": []}
        for name in dict.fromkeys(order.replace("c", "")):
            logits[name].append(step(model, caches[name], prompts[name]["input_ids"]))
        caches["c"] = copy.deepcopy(caches["a"])
        for name in order:
            logits[name].append(step(model, caches[name], new[:, len(logits[name]) - (name != "c") :][:, :1]))
        return logits

    with gated(gate).attached(model):
        apart, mixed = decode("aaabbbccc"), decode("abcabcabc")
    assert all(torch.equal(x, y) for name in apart for x, y in zip(apart[name], mixed[name], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(apart["a"][1:], apart["c"], strict=True))
    open_a, open_b = (margins > split(margins)).chunk(2)
    assert (open_a.any() or open_b.any()) and not torch.equal(open_a, open_b)


def test_two_models_share_a_gate(tiny):
    """The models run in turns, with opposite decisions."""
    first, second = tiny("llama"), tiny("llama")
    with torch.no_grad():
        second.model.embed_tokens.weight.neg_()
    batch = padded("left", (7, 5))
    margins = [pooled_prompt(model, batch) for model in (first, second)]
    gate = ProbeGate(W, -split(torch.cat(margins)), site=READ, per="generation")
    plans = [gated(gate), gated(gate)]
    attachments = [plan.attach(model) for plan, model in zip(plans, (first, second), strict=True)]
    alone = [generate(model, batch) for model in (first, second)]
    caches = [DynamicCache(), DynamicCache()]
    for model, cache in zip((first, second), caches, strict=True):
        step(model, cache, ids(2, 5))
    again = [step(model, cache, ids(2, 1)) for model, cache in zip((first, second), caches, strict=True)]
    for attachment in attachments:
        attachment.detach()
    for model, plan, text, logits in zip((first, second), plans, alone, again, strict=True):
        with plan.attached(model):
            assert torch.equal(generate(model, batch), text)
            cache = DynamicCache()
            step(model, cache, ids(2, 5))
            assert torch.equal(step(model, cache, ids(2, 1)), logits)


def test_a_prompt_of_one_token(tiny):
    model = tiny("llama")
    for tokens in (ids(4, 1), ids(4, 2)):
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        plan, opened = per_generation(model, batch)
        for mode in ("dynamic cache", "static cache"):
            with plan.attached(model) as attachment:
                generated = generate(model, batch, **MODES[mode])
                assert attachment.fired() == {"add@layers.1.output": int(opened.sum()) * (tokens.shape[1] + 5)}
            plain = generate(model, batch, **MODES[mode])
            assert torch.equal(generated[~opened], plain[~opened]) and not torch.equal(generated[opened], plain[opened])


def test_the_negation_of_a_prompts_gate_leaves_decoded_tokens_alone(tiny):
    """Each decoded token has its own pass without a prompt; this must not open the gate."""
    model, closed = tiny("llama"), ~ProbeGate(torch.zeros(32), 1.0, per="row")
    with gated(closed).attached(model) as attachment:
        generate(model, padded("left"))
        assert attachment.fired() == {"add@layers.1.output": 0}


# ---- which activation is read


def test_a_gate_sees_its_site_before_the_plan_edits_it(tiny):
    model, seen = tiny("llama"), {}

    def note(name):
        def function(h, ctx):
            seen[name] = h.detach().clone()
            return torch.ones(h.shape[:2])

        return CallGate(function, 32, site=READ if name == "before" else None)

    with torch.no_grad(), recorded(model, [READ, SITE]) as plain:
        model(ids())
    for order in (0, 1):
        interventions = [Intervention(Add(V), SITE), Intervention(Add(W), SITE, gate=note("here"))]
        with torch.no_grad(), Plan(interventions[::-1] if order else interventions).attached(model):
            model(ids())
        assert torch.equal(seen["here"], plain[SITE])
    both = Plan([Intervention(Add(V), READ), Intervention(Add(W), SITE, gate=note("before") & note("here"))])
    with torch.no_grad():
        with both.attached(model):
            model(ids())
        with edited(model.model.layers[0], lambda h: h + V), recorded(model, [SITE]) as moved:
            model(ids())
    assert torch.equal(seen["before"], plain[READ])
    assert torch.allclose(seen["here"], moved[SITE], atol=1e-6)  # what the plan did further down has arrived there


def test_a_stacked_plan_sees_what_the_one_before_it_did(tiny):
    model, seen = tiny("llama"), []
    reader = gated(CallGate(lambda h, ctx: seen.append(h.clone()) or torch.ones(h.shape[:2]), 32))
    with torch.no_grad(), recorded(model, [SITE]) as plain:
        model(ids())
    with torch.no_grad(), Plan(Intervention(Add(W), SITE)).attached(model), reader.attached(model, stack=True):
        model(ids())
    assert torch.allclose(seen[0], plain[SITE] + W, atol=1e-6)


def test_a_gate_shared_by_interventions_is_read_once(tiny):
    model, calls = tiny("llama"), []
    gate = CallGate(lambda h, ctx: calls.append(1) or h[..., 0], 32, site=READ)
    interventions = [
        Intervention(Add(V), SITE, gate=gate),
        Intervention(Add(W), SITE, gate=~gate & gate),
        Intervention(Add(V), "final_norm", gate=gate),
    ]
    with torch.no_grad(), Plan(interventions).attached(model):
        model(ids())
        assert calls == [1]
        with Plan(interventions[:1]).attached(model, stack=True):
            model(ids())
    assert calls == [1, 1, 1]
    free = CallGate(lambda h, ctx: calls.append(1) or h[..., 0], 32)
    calls.clear()
    with torch.no_grad(), Plan([Intervention(Add(V), site, gate=free) for site in (READ, SITE)]).attached(model):
        model(ids())
    assert calls == [1, 1]  # at each site once


def test_a_function_keeps_what_it_holds_on_to(tiny):
    """A plan works on copies of its interventions; a model that decides is not one of the things to copy."""

    class Judge(torch.nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(W.clone())

        def decide(self, h, ctx):
            self.calls += 1
            return h @ self.weight > 0

    model, judge = tiny("llama"), Judge()
    with torch.no_grad(), gated(CallGate(judge.decide, 32)).attached(model):
        model(ids())
    assert judge.calls == 1


def test_a_function_of_the_tokens(tiny):
    """Booleans and numbers, and what the context knows of the pass."""
    model, x = tiny("llama"), ids()
    runs = []
    for function in (lambda h, ctx: ctx.ids % 2 == 0, lambda h, ctx: 0.5 - (ctx.ids % 2)):
        with torch.no_grad(), gated(CallGate(function, 32)).attached(model) as attachment:
            runs.append(model(x).logits)
            assert attachment.fired() == {"add@layers.1.output": int((x % 2 == 0).sum())}
    with torch.no_grad(), edited(model.model.layers[1], lambda h: h + (x % 2 == 0).unsqueeze(-1) * V):
        assert all(torch.allclose(logits, model(x).logits, atol=1e-5) for logits in runs)


def test_sites_of_every_kind(tiny):
    """Inside blocks, the embedding, the unembedding, which a generation gives its last token only, and modules of any name."""
    model, batch = tiny("llama"), padded("left")
    for site, width in (("embed", 32), ("layers.1.attn.z", 32), ("logits", 96), ("module:model.layers.1.mlp:output", 32)):
        always = ProbeGate(torch.zeros(width), 1.0, per="row" if site == "logits" else "token", over="all")
        plan = Plan(Intervention(Add(vector(width)), site, gate=always & ProbeGate(torch.zeros(32), 1.0, site="embed")))
        with plan.attached(model):
            generated = generate(model, batch)
        with Plan(Intervention(Add(vector(width)), site)).attached(model):
            assert torch.equal(generated, generate(model, batch)), site


# ---- a real model


@pytest.mark.real
def test_steering_on_condition_in_a_real_model(smollm2):
    """One topic steered and another not, in one batch, by a condition vector from other texts of the two."""
    model, tokenizer = smollm2

    def encoded(texts):
        return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")

    cooking = ["Fry the onions in butter", "Simmer the soup for an hour", "Knead the dough and let it rise", "Roast the garlic in the oven"]
    maths = ["Prove that the sum is even", "Integrate the function twice", "Find the roots of it", "Compute the limit of the series"]
    held_out = ["Bake the bread until it is brown", "Differentiate the polynomial", "Chop the carrots", "Solve for x in this inequality"]
    site, batch = "layers.15.output", encoded(cooking + maths)
    with torch.no_grad(), recorded(model, [site]) as seen:
        model(**batch, position_ids=positions(batch))
    counted = (batch["attention_mask"].cumsum(1) > 1).unsqueeze(-1)  # a text's first token looks the same in all
    means = (seen[site] * counted).sum(1) / counted.sum(1)
    direction = means[:4].mean(0) - means[4:].mean(0)
    gate = ProbeGate(direction, -float(direction @ means.mean(0)), site=site, per="generation", over="prompt[1:]")
    loud = Plan(Intervention(Add(20 * torch.randn(576, generator=torch.Generator().manual_seed(0))), "layers.16.output", gate=gate))
    batch = encoded(held_out)
    plain = generate(model, batch)
    with loud.attached(model):
        steered = generate(model, batch)
    changed = (steered != plain).any(1).tolist()
    assert changed == [True, False, True, False]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "falcon", "llama"])
@pytest.mark.parametrize(("read", "steered"), [("q", "k"), ("k", "v"), ("q", "v"), ("v", "v")])
def test_a_gate_may_read_an_earlier_projection_of_the_same_module(family, read, steered, tiny):
    """Queries, keys and values may be columns of one tensor; the gate sees its own before any is edited."""
    model = tiny(family)
    anatomy = Anatomy.find(model)
    read_site, site = (f"layers.1.attn.{part}" for part in (read, steered))
    probe, added = vector(anatomy.point(read_site).width, 3), vector(anatomy.point(site).width, 4)
    with torch.no_grad(), recorded(model, list({read_site, site})) as seen:
        model(input_ids=ids())
    margins = seen[read_site] @ probe
    opened = (margins > split(margins))[..., None]  # [batch, tokens, 1]
    plan = Plan(Intervention(Add(added), site, gate=ProbeGate(probe, -split(margins), site=read_site)))
    with torch.no_grad(), plan.attached(model), recorded(model, [site]) as after:
        model(input_ids=ids())
    assert torch.allclose(after[site], seen[site] + opened * added, atol=1e-6)
