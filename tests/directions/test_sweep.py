"""Sweeps run once what slots and texts have in common, and measure what whole passes measure."""

import pytest
import torch
from families import FAMILIES
from hand import ids

from steer.directions import ContrastSet, Direction, select
from steer.directions import sweep as sweeping
from steer.directions.dose import side_effects
from steer.directions.passes import may_split, unchanged_blocks
from steer.directions.sweep import pair_gaps
from steer.intervene import Add, Intervention, Plan, ProbeGate
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.tokens import Row

HEAD = (1, 7, 7, 8, 9, 10)  # what all prompts begin with


def pairs(count: int = 4) -> ContrastSet:
    """Pairs of answers of different lengths to prompts of different lengths."""
    prompts = [(*HEAD, *ids(1, 2 + i, i)[0].tolist()) for i in range(count)]
    positive = tuple(Row((*prompt, 10, *ids(1, 1 + i % 3, 20 + i)[0].tolist()), len(prompt)) for i, prompt in enumerate(prompts))
    negative = tuple(Row((*prompt, 11, *ids(1, 3 - i % 3, 40 + i)[0].tolist()), len(prompt)) for i, prompt in enumerate(prompts))
    return ContrastSet(positive, negative, paired=True)


def prompts(seed: int, count: int = 4) -> list[Row]:
    tokens = [(*HEAD, *ids(1, 2 + i, seed + i)[0].tolist()) for i in range(count)]
    return [Row(row, len(row)) for row in tokens]


def direction(site: str, seed: int = 3) -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction(Site.parse(site), vector, "random", "response", {"activation_norm": 2.0})


def slots(of: Direction) -> torch.Tensor:
    return torch.tensor([0.0, 0.5, 2.0])[:, None] * of.vector


@pytest.fixture
def chosen(monkeypatch):
    """Records how the sweeps of a test ran; `chosen.full_passes = True` turns sharing off."""

    class Chosen:
        def __init__(self):
            self.runs = []
            self.full_passes = False

    seen = Chosen()
    cheapest = sweeping._cheapest

    def spy(*arguments):
        run = sweeping._Sweep(*arguments, share=False, gather=False) if seen.full_passes else cheapest(*arguments)
        seen.runs.append(run)
        return run

    monkeypatch.setattr(sweeping, "_cheapest", spy)
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gaps_of_pairs_are_those_of_whole_passes(family, chosen, tiny):
    model, contrast = tiny(family), pairs()
    for site, depth in [("embed", 0), ("layers.1.input", 1), ("layers.1.attn.output", 1), ("layers.1.output", 2), ("final_norm", 3)]:
        entry = direction(site)
        for scope in ("response", "all", "response[:2]~3"):
            chosen.full_passes = True
            expected = pair_gaps(model, entry, contrast, slots(entry), scope=scope)
            chosen.full_passes = False
            shared = pair_gaps(model, entry, contrast, slots(entry), scope=scope)
            assert torch.allclose(expected, shared, atol=1e-5)
            run = chosen.runs[-1]
            assert run.passes.depths == [depth] and run.shared is not None and run.passes.head is not None
            assert any(run.shared.prefixes)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_selection_is_that_of_whole_passes(family, chosen, tiny):
    model = tiny(family)
    candidates = [direction(f"layers.{layer}.output", seed) for seed, layer in enumerate((2, 0, 1, 1))]
    options = {"showing": prompts(1), "lacking": prompts(30), "tokens": [5, 6], "progress": False}
    for neutral in (None, prompts(60)):
        chosen.full_passes = True
        expected = select(model, candidates, neutral=neutral, **options)
        chosen.full_passes = False
        shared = select(model, candidates, neutral=neutral, **options)
        ablations, additions = chosen.runs[-2:]
        assert additions.passes.depths[:3] == [1, 2, 3] and len(ablations.shared.common) == len(HEAD) == len(additions.shared.common)
        assert (shared.showing, shared.lacking) == pytest.approx((expected.showing, expected.lacking), abs=1e-5)
        for a, b in zip(shared.candidates, expected.candidates, strict=True):
            assert (a.bypass, a.induce, a.kl) == pytest.approx((b.bypass, b.induce, b.kl), abs=1e-5)


def test_neutral_text_skips_the_blocks_below(chosen, tiny):
    model, entry = tiny("llama"), direction("layers.1.output")
    neutral = [Row(tuple(ids(1, 6 + i, i)[0].tolist()), 1) for i in range(4)]
    chosen.full_passes = True
    expected = side_effects(model, entry, neutral, slots(entry))
    chosen.full_passes = False
    calls = []
    for block in model.model.layers:
        block.mlp.forward = (lambda forward: lambda x: calls.append(x.shape[0]) or forward(x))(block.mlp.forward)
    shared = side_effects(model, entry, neutral, slots(entry))
    assert chosen.runs[-1].shared is None and chosen.runs[-1].passes.depths == [2]
    for a, b in zip(expected, shared, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert calls[-3:] == [4, 4, 12]  # two blocks for the texts, one for the texts in every slot


@pytest.mark.parametrize("reason", ["a hook", "a plan", "a hook on the head", "no positions", "positions ignored", "a skip of blocks"])
def test_passes_run_whole_where_they_cannot_be_shared(reason, chosen, tiny):
    model, contrast, entry = tiny("llama"), pairs(), direction("layers.1.output")
    plan = Plan(Intervention(Add(direction("embed", 5).vector), "layers.0.output", "prompt[-2:]"))
    forward = model.forward
    if reason == "a hook":
        model.model.layers[0].register_forward_hook(lambda module, args, output: output + 0.1 * torch.arange(output.shape[1])[:, None])
    elif reason == "a hook on the head":
        model.lm_head.register_forward_hook(lambda module, args, output: output * torch.arange(1, output.shape[1] + 1)[:, None])
    elif reason == "no positions":
        model.forward = lambda input_ids, attention_mask, use_cache=False: forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )
    elif reason == "positions ignored":
        model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    elif reason == "a skip of blocks":  # the last block takes a number from within the first, which a shorter pass leaves as it was
        first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
        first_forward, last_forward = first.forward, last.forward
        first.forward = lambda x: setattr(first, "size", x.sum()) or first_forward(x)
        last.forward = lambda x: last_forward(x) * (1 + first.size * x.shape[0])
    if reason == "a plan":
        plan.attach(model)
    chosen.full_passes = True
    expected = pair_gaps(model, entry, contrast, slots(entry))
    chosen.full_passes = False
    shared = pair_gaps(model, entry, contrast, slots(entry))
    run = chosen.runs[-1]
    assert run.shared is None and run.passes.depths == [0]
    assert (run.passes.head is None) == (reason not in ("a hook", "a plan"))
    assert torch.allclose(expected, shared, atol=1e-5)


def test_what_a_plan_leaves_unchanged_is_known(tiny):
    anatomy = Anatomy.find(tiny("llama"))
    vector = torch.ones(32)
    plan = Plan([Intervention(Add(vector), "layers.2.output"), Intervention(Add(vector), "layers.1.mlp.output")])
    assert unchanged_blocks(anatomy, plan) == 1 and may_split(plan)
    gated = Plan(Intervention(Add(vector), "layers.2.output", gate=ProbeGate(vector, site="layers.0.output")))
    assert unchanged_blocks(anatomy, gated) == 0 and not may_split(gated)
    assert unchanged_blocks(anatomy, Plan(Intervention(Add(vector), "module:model.layers.2:output"))) == 0
    assert not may_split(Plan(Intervention(Add(vector), "layers.2.output", "positions[0]")))
    assert may_split(Plan(Intervention(Add(vector), "layers.2.output", "response[-3:]")))
    assert not may_split(Plan(Intervention(Add(vector), "layers.2.output", "all!prompt")))
