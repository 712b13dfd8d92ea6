"""Values: the resumed pass is the whole one, the loss is the published one, and nothing of the model is touched."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import torch
from edits.edit_helpers import CONTEXTS, DENSE, FACTS, equal_weights, model_of, weights_of
from tiny_tokenizer import tiny_tokenizer

from steer.edits import Contexts, Fact, FirstTokenSubjectWarning, ValueSettings, ValueStore, edited_maps, locate, solve_values, target_ids
from steer.edits.value import fact_rows
from steer.edits.value_pass import ValuePass, may_resume
from steer.edits.value_problem import ValueProblem
from steer.errors import ConfigError, EditError, NonFiniteError
from steer.model.anatomy import Anatomy

TOKENIZER = tiny_tokenizer()
FEW = ValueSettings(steps=4, clamp=2.0, kl=0.5, weight_decay=0.1)
TWO_TOKENS = Fact.of("i like the {} of", "moon", "red water")


def values(model, facts=FACTS, settings=FEW, contexts=CONTEXTS, layer=0, **options):
    return solve_values(model, TOKENIZER, list(facts), contexts, layer, settings, **options)


def rows_of(facts=(*FACTS, TWO_TOKENS)):
    return [row for i, fact in enumerate(facts) for row in fact_rows(TOKENIZER, fact, CONTEXTS, i)]


def same(first, second):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.delta, other.delta, atol=2e-4, rtol=2e-4)
        assert one.loss == pytest.approx(other.loss, abs=1e-4) and (one.steps, one.stopped) == (other.steps, other.stopped)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_rest_of_the_texts_gives_predictions_and_gradients_of_whole_texts(family, layer):
    model = model_of(family).requires_grad_(False)
    anatomy = Anatomy.find(model)
    (edited,) = edited_maps(anatomy, [layer])
    rows = rows_of()
    results = []
    for is_resumed in (False, True):
        value_pass = ValuePass(model, anatomy, layer, [edited.module], rows, is_resumed=is_resumed)
        delta = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logprobs = value_pass.logits([delta]).log_softmax(-1)
        results.append((value_pass.written[0], value_pass.stream, logprobs, *torch.autograd.grad(logprobs[:, 3].sum(), delta)))
    for whole, rest in zip(*results, strict=True):
        torch.testing.assert_close(rest, whole, atol=2e-5, rtol=2e-5)
    assert may_resume(model, anatomy, layer, [edited.module], rows)


def loss_by_hand(model, fact, value, settings, layer=0):
    """Of whole texts, one at a time, with a hook: as the papers have it."""
    (edited,) = edited_maps(Anatomy.find(model), [layer])
    target = target_ids(TOKENIZER, fact.target)

    def logprobs(ids, site, delta):
        def add(_, __, output):
            output.view(-1, output.shape[-1])[site] += delta  # one text: OPT has no axis of texts here
            return output

        handle = edited.module.register_forward_hook(add)
        try:
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    nll = []
    for text in CONTEXTS.texts(fact.prompt):
        place = locate(TOKENIZER, text, fact.subject)
        found = logprobs((*place.ids, *target[:-1]), place.last, value.delta)
        nll.append(-sum(float(found[len(place.ids) - 1 + i, token]) for i, token in enumerate(target)) / len(target))
    essence = locate(TOKENIZER, f"{fact.subject} is a", fact.subject)
    before, after = (logprobs(essence.ids, essence.last, delta)[essence.last] for delta in (0, value.delta))
    kl = float((before.exp() * (before - after)).sum())
    return sum(nll) / len(nll) + settings.kl * kl + settings.weight_decay * float(value.delta.norm()) / value.block_norm**2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_the_loss_of_a_value_is_that_of_the_papers(family):
    model = model_of(family)
    for fact, value in zip((FACTS[0], TWO_TOKENS), values(model, (FACTS[0], TWO_TOKENS)), strict=True):
        assert value.loss == pytest.approx(loss_by_hand(model, fact, value, FEW), abs=1e-4)


def test_a_batch_gives_each_fact_what_it_gets_alone():
    model = model_of("llama")
    facts = (*FACTS, TWO_TOKENS)
    together = values(model, facts)
    same(together, [value for fact in facts for value in values(model, [fact])])
    same(together, values(model, facts, max_tokens=8))


def test_a_fact_that_is_done_leaves_the_others_as_they_are():
    model = model_of("llama")
    losses = sorted(value.loss for value in values(model, settings=replace(FEW, steps=1)))
    stopping = replace(FEW, stop_loss=(losses[0] + losses[1]) / 2)
    stopped = values(model, settings=stopping)
    assert sorted(value.steps for value in stopped)[0] == 1
    same(stopped, [value for fact in FACTS for value in values(model, [fact], stopping)])


def test_the_steps_of_adam_are_those_of_torch():
    model = model_of("llama").requires_grad_(False)
    settings = ValueSettings(steps=5, clamp=1e3, kl=0.0, weight_decay=0.0, lr=0.01)  # evaluations: 4 updates, whose moments matter
    (value,) = values(model, FACTS[:1], settings)
    anatomy = Anatomy.find(model)
    rows = fact_rows(TOKENIZER, FACTS[0], CONTEXTS, 0)
    delta = torch.zeros(1, 32, requires_grad=True)
    value_pass = ValuePass(model, anatomy, 0, [edited_maps(anatomy, [0])[0].module], rows, is_resumed=False)
    optimiser = torch.optim.Adam([delta], lr=0.01)
    for _ in range(4):
        logits = value_pass.logits([delta])
        loss = sum(row.weight * -logits[i].log_softmax(-1)[row.targets[0]] for i, row in enumerate(rows) if row.targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert value.steps == 5
    torch.testing.assert_close(value.delta, delta.detach()[0], rtol=1e-4, atol=1e-6)


def test_each_delta_is_kept_within_the_clamp_of_its_own_norm():
    for of, name in (("mlp_output", "mlp_norm"), ("block_output", "block_norm")):
        settings = ValueSettings(steps=3, clamp=0.05, clamp_of=of, lr=5.0, kl=0.0, weight_decay=0.0)
        for value in values(model_of("llama"), settings=settings):
            assert float(value.delta.norm()) == pytest.approx(0.05 * getattr(value, name), rel=1e-4)


def test_a_clamp_of_the_block_is_in_the_units_before_a_post_norm():
    model = model_of("gemma2")
    value = values(model, FACTS[:1])[0]
    anatomy = Anatomy.find(model)
    (edited,) = edited_maps(anatomy, [0])
    value_pass = ValuePass(model, anatomy, 0, [edited.module], rows_of(FACTS[:1])[:1], is_resumed=False)
    added = model.model.layers[0].post_feedforward_layernorm(value_pass.written[0]).norm()
    assert value.block_norm == pytest.approx(float(value_pass.stream.norm() / added * value_pass.written[0].norm()), rel=1e-4)
    torch.testing.assert_close(value.written, value_pass.written[0][0])


def test_the_best_delta_is_kept_where_the_loss_rises_again():
    model = model_of("llama")
    wild = replace(FEW, lr=40.0, clamp=50.0, steps=6)
    losses = [[value.loss for value in values(model, settings=replace(wild, steps=steps))] for steps in range(1, 7)]
    assert losses == [[min(pair) for pair in zip(*losses[: i + 1], strict=True)] for i in range(6)]
    for fact, value in zip(FACTS, values(model, settings=wild), strict=True):
        assert value.loss == pytest.approx(loss_by_hand(model, fact, value, wild), abs=1e-3)


def test_a_fact_may_stop_where_its_target_is_the_most_probable_in_all_contexts():
    model = model_of("gpt2")
    easy = ValueSettings(steps=40, clamp=20.0, kl=0.0, weight_decay=0.0, stop_loss=0.0)
    (at_first,) = values(model, FACTS[1:2], replace(easy, stop_at_argmax=1))
    (at_second,) = values(model, FACTS[1:2], replace(easy, stop_at_argmax=2))
    assert at_first.stopped == at_second.stopped == "argmax" and at_first.steps < at_second.steps < 40
    assert at_first.loss > at_second.loss


def test_what_the_model_says_already_is_no_edit():
    model = model_of("llama")
    ids = torch.tensor([locate(TOKENIZER, FACTS[0].prompt, "red cat").ids])
    said = TOKENIZER.decode(model(ids).logits[0, -1].argmax())
    (value,) = values(model, [FACTS[0].with_target(said)])
    assert value.is_no_op and value.steps == 1 and not value.delta.any()


def test_every_token_of_a_target_counts():
    model = model_of("llama")
    (value,) = values(model, [TWO_TOKENS], replace(FEW, steps=1))
    (first,) = values(model, [TWO_TOKENS.with_target("red")], replace(FEW, steps=1))
    assert value.loss != pytest.approx(first.loss, abs=1e-3)


def test_a_subject_at_the_first_token_is_optimised_behind_contexts_alone():
    fact = Fact.of("{} is a good song", "moon", "day")
    with pytest.warns(FirstTokenSubjectWarning):
        rows = fact_rows(TOKENIZER, fact, CONTEXTS, 0)
    assert [row.weight for row in rows] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0]) and rows[-1].site > 0
    with pytest.warns(FirstTokenSubjectWarning):
        alone = fact_rows(TOKENIZER, fact, Contexts(()), 0)
    assert [row.weight for row in alone] == [1.0, 0.0]


# ---- what is left alone


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [None, Broken, KeyboardInterrupt, torch.OutOfMemoryError])
def test_the_model_is_as_before_on_every_way_out(monkeypatch, error):
    model = model_of("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before, forwards = weights_of(model), [vars(module).get("forward") for module in model.modules()]
    if error is not None:
        values(model)
        calls = []

        def failing(self, deltas, whole=ValuePass.logits):
            calls.append(1)
            if len(calls) > 2:
                raise error
            return whole(self, deltas)

        monkeypatch.setattr(ValuePass, "logits", failing)
        with pytest.raises(error):
            values(model, FACTS[:1])
    else:
        values(model)
    assert equal_weights(model, before) and model.training and all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_want_of_memory_halves_a_batch(monkeypatch):
    model = model_of("llama")
    expected = values(model)
    sizes = []

    def solve(self, rows, facts, whole=ValueProblem.solve):
        sizes.append(len(facts))
        if len(facts) > 1:
            raise torch.OutOfMemoryError
        return whole(self, rows, facts)

    monkeypatch.setattr(ValueProblem, "solve", solve)
    same(values(model), expected)
    assert sizes == [3, 1, 2, 1, 1]


def test_numbers_that_are_not_finite_are_an_error_that_names_the_fact():
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="red cat"):
        values(model, FACTS[:1])


def test_somebody_elses_hook_sees_whole_texts():
    model = model_of("llama")
    expected = values(model, FACTS[:2])
    seen = []
    handle = model.model.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[1]))
    same(values(model, FACTS[:2]), expected)
    handle.remove()
    assert max(seen) >= 8  # the longest context and its prompt


def test_checkpointing_and_compilation_change_nothing():
    model = model_of("llama")
    expected = values(model, FACTS[:2])
    same(values(torch.compile(model), FACTS[:2]), expected)
    model.gradient_checkpointing_enable()
    same(values(model.train(), FACTS[:2]), expected)


def test_half_precision_is_optimised_in_single():
    for dtype in (torch.bfloat16, torch.float16):
        model = model_of("llama").to(dtype)
        before, after = (values(model, FACTS[:2], replace(FEW, steps=steps)) for steps in (1, 6))
        assert all(value.delta.dtype == torch.float32 for value in after)
        assert all(new.loss < old.loss for old, new in zip(before, after, strict=True))


def test_a_mixture_of_experts_and_settings_out_of_range_are_refused():
    with pytest.raises(EditError, match="down projection"):
        values(model_of("mixtral"))
    for settings in ({"lr": 0}, {"steps": 0}, {"clamp": -1}, {"clamp_of": "weight"}, {"kl": -1}, {"stop_at_argmax": 0}, {"stop_kl": -1}):
        with pytest.raises(ConfigError):
            ValueSettings(**settings)


# ---- the store


def test_a_value_is_found_again_only_for_the_same_weights_fact_layer_contexts_and_settings():
    model, store = model_of("llama"), ValueStore()
    first = values(model, cache=store)
    again = values(model, FACTS[:2], cache=store)
    assert store.found == 2 and len(store) == 3 and again[0] is first[0]
    values(model, FACTS[:1], replace(FEW, lr=0.1), cache=store)
    values(model, FACTS[:1], contexts=Contexts(CONTEXTS.prefixes[:1]), cache=store)
    values(model, FACTS[:1], layer=1, cache=store)
    values(model, [FACTS[0].with_target("dog")], cache=store)
    assert store.found == 2 and len(store) == 7
    model.lm_head.weight.data[5, 5] += 1e-3
    values(model, FACTS[:1], cache=store)
    assert store.found == 2
    model.lm_head.weight.data[5, 5] -= 1e-3


def test_adapters_that_are_switched_change_what_is_found():
    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    store = ValueStore()
    on = values(model, FACTS[:1], cache=store)
    with model.disable_adapter():
        off = values(model, FACTS[:1], cache=store)
    assert store.found == 0 and on[0].loss != off[0].loss
