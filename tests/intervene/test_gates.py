"""Gates against numbers worked out by hand, and in models: every row, call and model decides for itself."""

import copy
import itertools

import pytest
import torch
from hand import edited, ids, packed, padded, recorded, vector
from transformers import DynamicCache

from steer.errors import ConfigError, ContextError, NonFiniteError, WidthError
from steer.intervene import GATES, Ablate, Add, CallGate, CosineGate, FeatureGate, Intervention, Plan, ProbeGate
from steer.intervene.gate import Gate, Leaf
from steer.model.context import build
from steer.model.hooks import chat_roles

SITE, READ = "layers.1.output", "layers.0.output"
V, W = vector(seed=1), vector(seed=2)


def gated(gate: Gate, scope: str = "all", **options) -> Plan:
    return Plan(Intervention(Add(V), SITE, scope, gate=gate, **options))


def decided(gate: Gate, h: torch.Tensor, **given) -> torch.Tensor:
    """What a gate says of activations, [batch, tokens or 1]."""
    given = {"input_ids": torch.ones(h.shape[:2], dtype=torch.long), **given}
    ctx = build(given, None, False)
    leaves = list(gate.leaves())
    for number, leaf in enumerate(leaves):
        leaf.read(h, ctx, str(number))
    return gate.opened(ctx, map(str, range(len(leaves)))).squeeze(-1)


# ---- every kind


H = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[-1.0, 0.0], [1.0, -1.0]]])
BY_HAND = {
    "probe": (lambda **o: ProbeGate(torch.tensor([2.0, -1.0]), 1.5, **o), [[2 * 3 - 4 + 1.5, -2 + 1.5], [-2 + 1.5, 2 + 1 + 1.5]]),
    "cosine": (lambda **o: CosineGate(torch.tensor([0.0, 5.0]), 0.5, **o), [[0.8 - 0.5, 1 - 0.5], [0 - 0.5, -(0.5**0.5) - 0.5]]),
    "feature": (  # (h - b_dec) W + b - threshold
        lambda **o: FeatureGate(torch.tensor([1.0, 1.0]), -0.5, 0.25, center=torch.tensor([1.0, 2.0]), **o),
        [[2 + 2 - 0.75, -1 + 0 - 0.75], [-2 - 2 - 0.75, 0 - 3 - 0.75]],
    ),
    "call": (lambda **o: CallGate(lambda h, ctx: h[..., 0] * 2, 2, **o), [[6.0, 0.0], [-2.0, 2.0]]),
}


def test_every_kind_of_gate_is_tested():
    assert set(GATES) == set(BY_HAND) and all(name == GATES.get(name).name for name in GATES)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_gate_compares_what_its_formula_says(name):
    make, margins = BY_HAND[name]
    margins = torch.tensor(margins)
    assert torch.allclose(make().margin(H, build({"input_ids": torch.ones(2, 2)}, None, False)), margins, atol=1e-6)
    assert torch.equal(decided(make(), H), (margins > 0).float())
    assert torch.allclose(decided(make(sharpness=3.0), H), torch.sigmoid(3 * margins), atol=1e-6)
    for pool, pooled in (("mean", margins.mean(1)), ("max", margins.max(1).values)):
        found = decided(make(per="row", over="all", pool=pool, sharpness=3.0), H)
        assert torch.allclose(found, torch.sigmoid(3 * pooled)[:, None], atol=1e-6)
        assert torch.equal(decided(make(per="row", over="all", pool=pool), H), (pooled > 0).float()[:, None])


@pytest.mark.parametrize("name", sorted(set(BY_HAND) - {"call"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_large_activations_of_every_dtype(name, dtype):
    h = torch.stack([100 * V, -100 * V, torch.zeros(32), W * 1e3])[None].to(dtype)
    gate = {"probe": ProbeGate, "cosine": CosineGate, "feature": FeatureGate}[name](V)
    assert decided(gate, h).tolist() == [[1.0, 0.0, 0.0, float(V @ W > 0)]]
    assert decided(gate, h).dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_the_tokens_that_are_looked_at():
    h = torch.tensor([[-1.0, 5.0, -1.0, -1.0], [3.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, -9.0]])[..., None]
    labels = torch.tensor([[-100, -100, 1, 1], [-100, -100, -100, 1], [-100, 1, 1, 1]])
    for over, margins in {
        "prompt": [[-1, 5], [3, -1, -1], [1]],
        "response": [[-1, -1], [-1], [1, 1, -9]],
        "last": [[-1], [-1], [-9]],
        "positions[0,1]": [[-1, 5], [3, -1], [1, 1]],
    }.items():
        for pool, pooled in (("mean", [sum(row) / len(row) for row in margins]), ("max", [max(row) for row in margins])):
            gate = ProbeGate(torch.ones(1), per="row", over=over, pool=pool, sharpness=1.0)
            assert torch.allclose(decided(gate, h, labels=labels)[:, 0], torch.sigmoid(torch.tensor(pooled)))
    with_roles = ProbeGate(torch.ones(1), per="row", over="role[user]")
    ctx = build({"input_ids": torch.ones(1, 4)}, None, False, turns=torch.tensor([[0, 1, 1, 2]]))
    with_roles.read(h[:1], ctx, "it")
    assert with_roles.opened(ctx, iter(["it"])).flatten().tolist() == [1.0]  # 5 and -1


# ---- combinations


def test_truth_tables():
    for a, b in itertools.product((0.0, 1.0), repeat=2):
        h = torch.tensor([[[a * 2 - 1, b * 2 - 1]]])
        one, two = ProbeGate(torch.tensor([1.0, 0.0])), ProbeGate(torch.tensor([0.0, 1.0]))
        for gate, wanted in (
            (one & two, a and b),
            (one | two, a or b),
            (~one, not a),
            (~(one | ~two) & ~one, not (a or not b) and not a),
            (one & ~two | ~one & two, a != b),
        ):
            assert decided(gate, h).item() == float(wanted)


def test_soft_values_multiply_as_independent_chances():
    h = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    one, two = (ProbeGate(torch.eye(2)[i], 0.1, sharpness=2.0) for i in (0, 1))
    a, b = decided(one, h), decided(two, h)
    assert torch.allclose(decided(one & two, h), a * b)
    assert torch.allclose(decided(one | two, h), a + b - a * b)
    assert torch.allclose(decided(~one, h), 1 - a)
    assert torch.allclose(decided(~(one & two), h), decided(~one | ~two, h))  # de Morgan


def test_gates_of_tokens_and_of_rows_combine():
    h = torch.tensor([[[1.0], [-1.0], [3.0]], [[-5.0], [1.0], [1.0]]])
    token, row = ProbeGate(torch.ones(1)), ProbeGate(torch.ones(1), per="row", over="all")
    assert decided(token & row, h).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert decided(token | row, h).tolist() == [[1, 1, 1], [0, 1, 1]]


def test_a_row_without_a_token_to_look_at_is_not_decided():
    """Neither open nor, for its negation, closed; the other side of an `or` decides alone."""
    h, labels = torch.ones(2, 2, 1), torch.tensor([[-100, -100], [1, 1]])
    gate, always = ProbeGate(torch.ones(1), per="row"), ProbeGate(torch.zeros(1), 1.0)
    for made, wanted in ((gate, [1, 0]), (~gate, [0, 0]), (~~gate, [1, 0]), (gate | always, [1, 1]), (~gate & always, [0, 0])):
        assert decided(made, h, labels=labels)[:, 0].tolist() == wanted


def test_the_negation_of_a_prompts_gate_leaves_decoded_tokens_alone(tiny):
    """Each decoded token is a pass of its own, which has no prompt: that is no reason to open."""
    model, closed = tiny("llama"), ~ProbeGate(torch.zeros(32), 1.0, per="row")
    with gated(closed).attached(model) as plan:
        generate(model, padded("left"))
        assert plan.fired() == {"add@layers.1.output": 0}


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
        given = {key: batch[key] for key in ("input_ids", "attention_mask")} | {"position_ids": positions(batch)}
        with torch.no_grad():
            with plan.attached(model):
                found = model(**given).logits
            with edited(model.model.layers[1], lambda h, o=opened: h + o[:, None, None] * V):
                wanted = model(**given).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(found[real], wanted[real], atol=1e-5)
        assert plan.fired() == {"add@layers.1.output": int(real[opened].sum())}


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
        wanted = (pooled > threshold).gather(1, text) & ~prompt
        assert 0 < wanted.sum() < (~prompt).sum()
        with torch.no_grad():
            with plan.attached(model):
                found = model(**batch).logits
            with edited(model.model.layers[1], lambda h, w=wanted: h + w.unsqueeze(-1) * V):
                assert torch.allclose(found, model(**batch).logits, atol=1e-5)
        assert plan.fired() == {"add@layers.1.output": int(wanted.sum())}


MODES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_prompt_decides_holds_for_its_generation(family, mode, tiny):
    """Open rows are generated as with the plan without its gate, closed ones as without the plan, each as if it were alone."""
    model, batch = tiny(family), padded("left", (7, 4, 6, 5))
    plan, opened = per_generation(model, batch)
    plan.set_strength(8.0)
    with plan.attached(model):
        found = generate(model, batch, **MODES[mode])
    ungated = Plan(Intervention(Add(V), SITE, strength=8.0))
    rows = len(found) // 4
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        plain = generate(model, alone, **MODES[mode])
        with ungated.attached(model):
            steered = generate(model, alone, **MODES[mode])
        assert not torch.equal(steered, plain)
        assert torch.equal(found[row * rows : (row + 1) * rows], steered if opened[row] else plain)


def test_nothing_is_left_of_an_open_gate_in_the_next_call(tiny):
    """CAST keeps its decision in the class: a threshold that nothing exceeds would still steer the next prompt."""
    model, batch = tiny("llama"), padded("left")
    plain = generate(model, batch)
    for per in ("token", "row", "generation"):
        plan = gated(ProbeGate(torch.zeros(32), 1.0, per=per))
        with plan.attached(model):
            assert not torch.equal(generate(model, batch), plain)
            before = plan.fired()
            plan.interventions[0].gate.tensors["bias"].fill_(-1e9)
            assert torch.equal(generate(model, batch), plain)
            assert plan.fired() == before


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
        caches, found = {name: DynamicCache() for name in prompts}, {"a": [], "b": [], "c": []}
        for name in dict.fromkeys(order.replace("c", "")):
            found[name].append(step(model, caches[name], prompts[name]["input_ids"]))
        caches["c"] = copy.deepcopy(caches["a"])
        for name in order:
            found[name].append(step(model, caches[name], new[:, len(found[name]) - (name != "c") :][:, :1]))
        return found

    with gated(gate).attached(model):
        apart, mixed = decode("aaabbbccc"), decode("abcabcabc")
    assert all(torch.equal(x, y) for name in apart for x, y in zip(apart[name], mixed[name], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(apart["a"][1:], apart["c"], strict=True))
    open_a, open_b = (margins > split(margins)).chunk(2)
    assert (open_a.any() or open_b.any()) and not torch.equal(open_a, open_b)


def test_two_models_share_a_gate(tiny):
    """In turns, with the opposite decision for each."""
    one, two = tiny("llama"), tiny("llama")
    with torch.no_grad():
        two.model.embed_tokens.weight.neg_()
    batch = padded("left", (7, 5))
    margins = [pooled_prompt(model, batch) for model in (one, two)]
    gate = ProbeGate(W, -split(torch.cat(margins)), site=READ, per="generation")
    plans = [gated(gate).attach(model) for model in (one, two)]
    alone = [generate(model, batch) for model in (one, two)]
    caches = [DynamicCache(), DynamicCache()]
    for model, cache in zip((one, two), caches, strict=True):
        step(model, cache, ids(2, 5))
    again = [step(model, cache, ids(2, 1)) for model, cache in zip((one, two), caches, strict=True)]
    for plan in plans:
        plan.detach()
    for model, plan, text, logits in zip((one, two), plans, alone, again, strict=True):
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
            with plan.attached(model):
                found = generate(model, batch, **MODES[mode])
                assert plan.fired() == {"add@layers.1.output": int(opened.sum()) * (tokens.shape[1] + 5)}
            plain = generate(model, batch, **MODES[mode])
            assert torch.equal(found[~opened], plain[~opened]) and not torch.equal(found[opened], plain[opened])


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
        ones = [Intervention(Add(V), SITE), Intervention(Add(W), SITE, gate=note("here"))]
        with torch.no_grad(), Plan(ones[::-1] if order else ones).attached(model):
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
    ones = [
        Intervention(Add(V), SITE, gate=gate),
        Intervention(Add(W), SITE, gate=~gate & gate),
        Intervention(Add(V), "final_norm", gate=gate),
    ]
    with torch.no_grad(), Plan(ones).attached(model):
        model(ids())
        assert calls == [1]
        with Plan(ones[:1]).attached(model, stack=True):
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
    found = []
    for function in (lambda h, ctx: ctx.ids % 2 == 0, lambda h, ctx: 0.5 - (ctx.ids % 2)):
        with torch.no_grad(), gated(CallGate(function, 32)).attached(model) as plan:
            found.append(model(x).logits)
            assert plan.fired() == {"add@layers.1.output": int((x % 2 == 0).sum())}
    with torch.no_grad(), edited(model.model.layers[1], lambda h: h + (x % 2 == 0).unsqueeze(-1) * V):
        assert all(torch.allclose(one, model(x).logits, atol=1e-5) for one in found)


def test_sites_of_every_kind(tiny):
    """Inside blocks, the embedding, the unembedding, which a generation gives its last token only, and modules of any name."""
    model, batch = tiny("llama"), padded("left")
    for site, width in (("embed", 32), ("layers.1.attn.z", 32), ("logits", 96), ("module:model.layers.1.mlp:output", 32)):
        always = ProbeGate(torch.zeros(width), 1.0, per="row" if site == "logits" else "token", over="all")
        plan = Plan(Intervention(Add(vector(width)), site, gate=always & ProbeGate(torch.zeros(32), 1.0, site="embed")))
        with plan.attached(model):
            found = generate(model, batch)
        with Plan(Intervention(Add(vector(width)), site)).attached(model):
            assert torch.equal(found, generate(model, batch)), site


# ---- files


@pytest.mark.parametrize("form", ["plan", "plan.safetensors"])
def test_saved_and_loaded_to_the_bit(form, tiny, tmp_path):
    model, batch = tiny("llama"), padded("left")
    one = ProbeGate(W, 0.3, site=READ, per="generation", over="prompt[-2:]", pool="max", sharpness=7.3)
    gate = one & ~(CosineGate(V, 0.123) | FeatureGate(W, 0.7, 0.1, center=V, per="row", over="all"))
    plan = Plan([Intervention(Add(V), SITE, gate=gate, preserve_norm=True), Intervention(Add(W), READ)])
    loaded = Plan.load(plan.save(tmp_path / form))
    assert loaded.explain() == plan.explain()
    assert loaded.interventions[0].to_dict() == plan.interventions[0].to_dict() and loaded.interventions[1].gate is None
    ours, theirs = (one.interventions[0].files() for one in (plan, loaded))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    found = []
    for each in (plan, loaded):
        with each.attached(model), torch.no_grad():
            found += [model(**batch).logits, generate(model, batch)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_learned_gate_stays_one_and_stays_shared(tmp_path):
    gate = CosineGate(W, 0.2, sharpness=2.0).train()
    operator = Add(V).train()
    other = Intervention(Ablate(W), "layers.2.output", gate=ProbeGate(W, sharpness=1.0).train())
    plan = Plan([Intervention(operator, SITE, gate=gate), Intervention(operator, READ, gate=~gate), other])
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert [tuple(one.shape) for one in loaded.parameters()] == [tuple(one.shape) for one in plan.parameters()] and len(
        plan.parameters()
    ) == 5
    first, second, third = ({name: id(one) for name, one in i.parameters.items()} for i in loaded.interventions)
    assert first == second and not set(first.values()) & set(third.values())
    assert not isinstance(third["gate0.bias"], torch.nn.Parameter) and loaded.interventions[2].operator.parameters == {}
    state = plan.state_dict()
    with torch.no_grad():
        plan.parameters()[0].zero_()
    plan.load_state_dict(state)
    assert torch.equal(plan.parameters()[0][0], V)


# ---- mistakes


def test_a_gate_that_would_decide_too_late(tiny):
    model = tiny("llama")
    for read, steered in (("layers.2.output", SITE), ("layers.1.mlp.output", "layers.1.attn.output"), (SITE, "layers.1.input")):
        with pytest.raises(ConfigError, match="would decide after the edit"):
            Plan(Intervention(Add(V), steered, gate=ProbeGate(W, site=read))).attach(model)
    late = Plan(Intervention(Add(V), "module:model.layers.0.mlp:output", gate=ProbeGate(W, site="module:model.layers.2.mlp:output")))
    with late.attached(model), pytest.raises(ContextError, match="did not decide before"):
        model(ids())


def test_widths(tiny):
    with pytest.raises(WidthError, match="gate 'probe' does not fit"):
        gated(ProbeGate(vector(31))).attach(tiny("llama"))
    with pytest.raises(WidthError, match="gate 'cosine' does not fit"):
        gated(CosineGate(vector(), site="logits") & ProbeGate(W)).attach(tiny("llama"))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ProbeGate(torch.randn(2, 32)), ConfigError),
        (lambda: ProbeGate(W, torch.tensor([0.0, 1.0])), ConfigError),
        (lambda: CosineGate(torch.zeros(32)), ConfigError),
        (lambda: ProbeGate(W * torch.nan), NonFiniteError),
        (lambda: CosineGate(W, float("inf")), NonFiniteError),
        (lambda: ProbeGate(W, per="tokens"), ConfigError),
        (lambda: ProbeGate(W, per="row", pool="median"), ConfigError),
        (lambda: ProbeGate(W, over="everything"), ConfigError),
        (lambda: ProbeGate(W, over="response~8"), ConfigError),
        (lambda: ProbeGate(W, sharpness=0.0), ConfigError),
        (lambda: ProbeGate(W, sharpness=-1.0), ConfigError),
        (lambda: ProbeGate(W, sharpness=float("nan")), ConfigError),
        (lambda: ProbeGate(W, sharpness=float("inf")), NonFiniteError),
        (lambda: ProbeGate(W, site="layers.one"), ValueError),
        (lambda: ProbeGate(W).train(), ConfigError),
        (lambda: CallGate(lambda h, ctx: h, 32, sharpness=1.0).train(), ConfigError),
    ],
)
def test_arguments_that_make_no_gate(make, error):
    with pytest.raises(error):
        make()


def test_a_call_can_neither_be_saved_nor_answer_anything(tiny, tmp_path):
    model = tiny("llama")
    with pytest.raises(ConfigError, match="cannot be saved"):
        gated(~CallGate(lambda h, ctx: h[..., 0], 32)).save(tmp_path / "plan")
    assert not list(tmp_path.iterdir())
    for function in (lambda h, ctx: h, lambda h, ctx: 1.0, lambda h, ctx: None, lambda h, ctx: h[:, 0, 0]):
        with gated(CallGate(function, 32)).attached(model), pytest.raises(ContextError, match="does not decide for each token"):
            model(ids())


def test_a_prompt_that_cannot_be_told(tiny):
    model = tiny("llama")
    with gated(ProbeGate(W, per="row")).attached(model), pytest.raises(ContextError, match="cannot tell prompt from response"):
        model(ids(), use_cache=False)
    gate = ProbeGate(torch.zeros(32), 1.0, per="row", over="role[user]")
    with gated(gate).attached(model) as plan, chat_roles(model, torch.tensor([[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 2, 2, 2]])):
        model(ids(), use_cache=False)
        assert plan.fired() == {"add@layers.1.output": 7}  # the second row has no user


def test_a_kind_of_ones_own():
    class Norm(Leaf):
        """Opens where an activation is long."""

        name = "norm"

        def margin(self, h, ctx):
            return h.norm(dim=-1) - self.tensors["length"]

    gate = Norm({"length": torch.tensor([3.0])}, 2)
    assert decided(gate, H).tolist() == [[1, 0], [0, 0]] and str(gate) == "norm per token"


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
    kept = (batch["attention_mask"].cumsum(1) > 1).unsqueeze(-1)  # a text's first token looks the same in all
    means = (seen[site] * kept).sum(1) / kept.sum(1)
    direction = means[:4].mean(0) - means[4:].mean(0)
    gate = ProbeGate(direction, -float(direction @ means.mean(0)), site=site, per="generation", over="prompt[1:]")
    loud = Plan(Intervention(Add(20 * torch.randn(576, generator=torch.Generator().manual_seed(0))), "layers.16.output", gate=gate))
    batch = encoded(held_out)
    plain = generate(model, batch)
    with loud.attached(model):
        steered = generate(model, batch)
    changed = (steered != plain).any(1).tolist()
    assert changed == [True, False, True, False]
