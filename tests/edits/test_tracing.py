"""Causal tracing: the fast passes give what whole passes give, those give what hooks by hand give, and the model stays as it was."""

import random

import pytest
import torch
from edits.tracing_helpers import FIRST, LATER, TOKENIZER, apart, facts_of, known, traced, traced_plainly
from interrupts import interrupted, lines_of
from transformers import BloomConfig, BloomForCausalLM

from steer.edits import Fact, causal_trace
from steer.edits.tracing import KINDS, fast
from steer.edits.tracing.cells import Cell, Restoring
from steer.edits.tracing.joining import joinings
from steer.edits.tracing.passes import Passes
from steer.edits.tracing.plain import plain_logits
from steer.edits.tracing.prompts import traced_prompts
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy

FAMILIES = ("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "opt", "phi3", "mixtral")


@pytest.fixture(scope="module")
def llama():
    from families import FAMILIES as build

    return build["llama"]()


# ---- equality


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_passes_give_what_whole_passes_give(tiny, family):
    model = tiny(family)
    facts = facts_of(model)
    found = traced(model, facts)
    assert found.about["whole_passes"] == 0 and found.kinds == KINDS
    assert apart(found, traced_plainly(model, facts)) < 1e-6
    for trace, before in zip(found, (0, 3), strict=True):
        assert trace.first == before and not trace.effects[:, :, :before].any(), "before the subject nothing can change"
        assert all(float(of_kind.abs().max()) > 1e-4 for of_kind in trace.effects[0])
        assert torch.equal(trace.restored[:, 0, -1, -1], trace.clean) and not trace.effects[:, 0, :-1, -1].any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("severed", ["mlp", "attn"])
def test_severed_runs_are_the_same_in_both_ways(tiny, family, severed):
    model = tiny(family)
    facts = facts_of(model)
    kinds = [kind for kind in KINDS if kind != severed]
    found = traced(model, facts, kinds=kinds, severed=severed)
    assert found.about["whole_passes"] == 0
    assert apart(found, traced_plainly(model, facts, kinds=kinds, severed=severed)) < 1e-6
    assert apart(found, traced(model, facts, kinds=kinds)) > 1e-4, "severing changes what comes back"


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 3}, {"window": 10}, {"max_tokens": 1}, {"samples": 1}, {"max_tokens": 60}])
def test_windows_and_sizes_of_batches(llama, options):
    facts = facts_of(llama)
    assert apart(traced(llama, facts, **options), traced_plainly(llama, facts, **options)) < 1e-6


def test_want_of_memory_halves_a_batch(llama, monkeypatch):
    facts = facts_of(llama)
    expected = traced(llama, facts)
    sizes, logits = [], fast._Batch.logits

    def small(batch):
        sizes.append(len(batch.joinings))
        if len(batch.joinings) > 2:
            raise torch.OutOfMemoryError
        return logits(batch)

    monkeypatch.setattr(fast._Batch, "logits", small)
    found = traced(llama, facts)
    assert max(sizes) > 2 and found.about["whole_passes"] == 0 and apart(found, expected) < 1e-6


@pytest.mark.parametrize("corruption", ["replacement", "mean"])
def test_other_corruptions(llama, corruption):
    facts = facts_of(llama)
    found = traced(llama, facts, corruption=corruption)
    assert len(found) == 2 and found.about["samples"] == 1
    assert apart(found, traced_plainly(llama, facts, corruption=corruption)) < 1e-6


def by_hand(model, prompt, corrupted, kind, token, layers, severed=None):
    """[1 + samples, vocabulary], with hooks of torch on a llama; row 0 is the clean run."""
    handles, runs = [], {}

    def embed(module, args, output):
        output = output.clone()
        output[1:, prompt.first : prompt.last + 1] = corrupted
        return output

    def restore(module, args, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[1:, token] = h[0, token]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def keep(place):
        return lambda module, args, output: runs.__setitem__(place, output[0] if isinstance(output, tuple) else output)

    def sever(place):
        def hook(module, args, output):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[1:, token] = runs[place][1:, token]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    def module_of(part, layer):
        block = model.model.layers[layer]
        return {"hidden": block, "mlp": block.mlp, "attn": block.self_attn}[part]

    ids = torch.tensor([prompt.ids] * (1 + len(corrupted)))
    handles.append(model.model.embed_tokens.register_forward_hook(embed))
    try:
        if severed:
            kept = [module_of(severed, layer).register_forward_hook(keep(layer)) for layer in range(3)]
            model(ids, use_cache=False)
            for handle in kept:
                handle.remove()
            handles += [module_of(severed, layer).register_forward_hook(sever(layer)) for layer in range(3)]
        handles += [module_of(kind, layer).register_forward_hook(restore) for layer in layers]
        with torch.no_grad():
            return model(ids, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("severed", [None, "mlp"])
def test_whole_passes_are_those_of_hooks_by_hand(llama, severed):
    restoring = Restoring.of(["hidden", "attn"] if severed else KINDS, 2, severed)
    anatomy = Anatomy.find(llama)
    (prompt,) = traced_prompts(TOKENIZER, [known(llama, *LATER)], anatomy)
    passes = Passes(llama, anatomy, restoring.sites(anatomy))
    corrupted = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        record = passes.record(prompt, corrupted, with_cache=False)
        for cell in [*restoring.cells(4, 3), *restoring.cells(9, 3)]:
            found = plain_logits(passes, prompt, corrupted, cell, severed, record)
            expected = by_hand(llama, prompt, corrupted, cell.kind, cell.token, cell.layers, severed)[1:]
            assert torch.allclose(found, expected, atol=1e-6), cell


def test_windows_are_cut_off_at_the_ends():
    def layers_of(window):
        return [(cell.layers.start, cell.layers.stop) for cell in Restoring.of("mlp", window, None).cells(0, 30)]

    assert layers_of(10) == [(max(0, layer - 5), min(30, layer + 5)) for layer in range(30)]
    assert layers_of(1) == [(layer, layer + 1) for layer in range(30)] and layers_of(3)[5] == (4, 7)


def test_cells_that_are_alike_below_a_layer_are_run_once_there():
    cells = Restoring.of("attn", 10, None).cells(0, 30)
    found = joinings(cells, 30)
    assert [joining.layer for joining in found] == sorted(joining.layer for joining in found)
    for place, joining in enumerate(found):
        if joining.like is not None:
            trunk = found[joining.like]
            assert joining.like < place and joining.layer == joining.cell.layers.stop > trunk.layer
            assert trunk.cell.layers.start == joining.cell.layers.start and trunk.cell.layers.stop > joining.layer
    assert sum(joining.like is not None for joining in found) == 5, "the windows cut off at the lower end"
    only = joinings([Cell("mlp", 0, layer, range(0, 2)) for layer in range(2)], 2)
    assert [(joining.layer, joining.like) for joining in only] == [(1, None), (2, 0)]


# ---- what cannot be proven runs whole


def test_a_foreign_hook_may_look_at_whole_passes(llama):
    facts, widths = facts_of(llama), []
    expected = traced(llama, facts)
    handle = llama.model.layers[1].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    try:
        found = traced(llama, facts)
    finally:
        handle.remove()
    assert found.about["whole_passes"] == 2 and set(widths) == {6, 10} and apart(found, expected) < 1e-6


def test_a_plan_that_is_attached_stays_in_force(llama):
    fact = known(llama, *FIRST)
    plan = Plan(Intervention(Add(torch.ones(32)), "layers.1.output", strength=0.01))
    with plan.attached(llama):
        found = traced(llama, [fact])
    assert "1 of the facts had a whole pass for every cell" in found.table()
    assert found.about["whole_passes"] == 1 and abs(float(found[0].clean[0] - traced(llama, [fact])[0].clean[0])) > 1e-5


def test_a_model_whose_blocks_need_as_many_rows_as_it_was_called_with_runs_whole():
    torch.manual_seed(0)  # ALiBi has a bias for each row and head
    bloom = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()
    facts = facts_of(bloom)
    found = traced(bloom, facts)
    assert found.about["whole_passes"] == 2 and apart(found, traced_plainly(bloom, facts)) == 0


def test_a_model_on_which_the_fast_passes_fail_runs_whole(tiny, monkeypatch):
    model = tiny("llama")
    facts = facts_of(model)
    expected = traced_plainly(model, facts)

    def refuses(*_):
        raise RuntimeError("no rows of this kind")

    with monkeypatch.context() as patch:
        patch.setattr(fast, "lend_rows", refuses)
        assert traced(model, facts).about["whole_passes"] == 2
    whole = fast.FastPasses.logits

    def others(self, cells):
        for batch, logits in whole(self, cells):
            yield batch, logits + torch.linspace(0, 0.01, logits.shape[-1])

    with monkeypatch.context() as patch:
        patch.setattr(fast.FastPasses, "logits", others)
        found = traced(model, facts)
    assert found.about["whole_passes"] == 2 and apart(found, expected) < 1e-6
    assert traced(model, facts).about["whole_passes"] == 0


# ---- the model stays as it was


def state_of(model):
    return [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), vars(module).get("forward"))
        for module in model.modules()
    ]


def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(tiny):
    model = tiny("llama").train()
    facts = [known(model, "cat sat on", "cat")]
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}

    def action():
        traced(model, facts, samples=1)

    action()  # the model is surveyed and tried once
    count = lines_of(action)
    for line in sorted(random.Random(0).sample(range(count), 25)):
        assert interrupted(action, line)
        assert state_of(model) == before
    action()
    assert state_of(model) == before and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# ---- the embedded model


@pytest.mark.real
def test_the_last_token_carries_the_whole_effect_at_the_top_of_the_embedded_model(smollm2):
    model, tokenizer = smollm2
    fact = Fact.of("{} is in the city of", "The Eiffel Tower", "Paris")
    found = causal_trace(model, tokenizer, [fact], kinds="hidden", samples=1, progress=False)
    effects, total = found.indirect_effects(0, "hidden"), float(found[0].total_effect[0])
    assert found.about["whole_passes"] == 0 and total > 0.5 and found[0].answer == " Paris"
    assert float(effects[-1, -1]) == total and float(effects[-1, 26]) > 0.5 * total > float(effects[-1, 15])
    assert abs(found.about["corruption"]["deviation_of_subjects"] - 0.12) < 0.02
