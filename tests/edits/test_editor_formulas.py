"""What each editor solves, against its formula written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edits.edit_helpers import CONTEXTS, FACTS, model_of
from edits.editor_helpers import (
    STRONG,
    TOKENIZER,
    UNSAID,
    close,
    covariance_of,
    edit,
    inverse,
    keys_of,
    of_three_blocks,
    probabilities,
    values_of,
)

from steer.edits import (
    EditBench,
    ValueSettings,
    fact_keys,
)
from steer.edits.editors.alphaedit import AlphaEdit, LowEnergySpace
from steer.edits.editors.constrained_ft import ConstrainedFT
from steer.edits.editors.emmet import EMMET
from steer.edits.editors.lora import LoRA
from steer.edits.editors.memit import MEMIT
from steer.edits.editors.pmet import PMET
from steer.edits.editors.r_rome import RROME
from steer.edits.editors.rome import ROME
from steer.edits.solve import PastKeys, solve_keys
from steer.errors import EditError
from steer.model.site import Site


def test_memit_is_the_formula_with_the_covariance_written_out():
    model, covariance = model_of("llama"), covariance_of("llama")
    made = edit(model, editor=MEMIT(value_settings=STRONG))
    keys, wanted = keys_of(model), values_of(model)
    moment = covariance.moment(0) + 1e-4 * covariance.moment(0).diagonal().mean() * torch.eye(64)
    a = 64 * moment + keys.T @ keys
    close(made.deltas[0], wanted.T @ keys @ torch.linalg.inv(a))
    strength = torch.tensor([reading["strength"] for reading in made.provenance["readings"]])
    torch.testing.assert_close(strength, torch.einsum("nf,fg,ng->n", keys, torch.linalg.inv(a), keys), check_dtype=False)


def test_emmet_is_the_formula_and_writes_exactly():
    model, covariance = model_of("llama"), covariance_of("llama")
    made = edit(model, editor=EMMET(value_settings=STRONG))
    keys, wanted = keys_of(model), values_of(model)
    whitened = inverse(covariance) @ keys.T
    close(made.deltas[0], wanted.T @ torch.linalg.inv(keys @ whitened) @ whitened.T)
    torch.testing.assert_close(keys @ made.deltas[0].change().double().T, wanted, atol=1e-5, rtol=1e-4)


def test_emmet_with_its_ridge_is_memit():
    """The push-through identity: lambda = ridge * covariance weight."""
    factor = covariance_of("llama").factor(0)
    keys, wanted = keys_of(model_of("llama")), values_of(model_of("llama"))
    emmet = solve_keys(keys, wanted, lambda k: factor.solve(k) / 30.0, 0.1)
    memit = solve_keys(keys, wanted, factor.solve, 3.0)
    difference = emmet.u @ emmet.v.T - memit.u @ memit.v.T
    assert float(difference.norm() / (memit.u @ memit.v.T).norm()) < 1e-8
    torch.testing.assert_close(emmet.strength, memit.strength, rtol=1e-8, atol=1e-8)
    model = model_of("llama")
    as_emmet = edit(model, editor=EMMET(value_settings=STRONG, ridge=0.1, covariance_weight=30.0))
    as_memit = edit(model, editor=MEMIT(value_settings=STRONG, ridge=3.0))
    close(as_emmet.deltas[0], as_memit.deltas[0].change().double())


def test_alphaedit_is_the_formula_and_stays_in_its_space():
    model, covariance = model_of("llama"), covariance_of("llama")
    made = edit(model, editor=AlphaEdit(value_settings=STRONG))
    keys, wanted = keys_of(model), values_of(model)
    eigenvalues, vectors = torch.linalg.eigh(covariance.moment(0))
    small = eigenvalues < 1.5 * eigenvalues.median()
    p = vectors[:, small] @ vectors[:, small].T
    ridge = 0.1 * keys.square().sum(1).median()
    close(made.deltas[0], wanted.T @ keys @ p @ torch.linalg.inv(keys.T @ keys @ p + ridge * torch.eye(64)))
    assert float((made.deltas[0].change().double() @ vectors[:, ~small]).norm()) < 1e-5 * made.deltas[0].norm


def test_the_low_energy_space_is_the_same_by_the_vectors_outside_it():
    factor = covariance_of("llama").factor(0)
    values, vectors = factor.eigen()
    keys = keys_of(model_of("llama")).T
    for threshold in (float(values[10]), float(values[50])):
        space = LowEnergySpace.of(factor, threshold, 0)
        inside = vectors[:, values < threshold]
        torch.testing.assert_close(space.projected(keys), inside @ (inside.T @ keys))
        assert space.vectors.shape[1] <= 32 and 0 < space.share < 1
    with pytest.raises(EditError, match="eigenvalue"):
        LowEnergySpace.of(factor, float(values[0]) / 2, 0)


def test_past_keys_are_in_the_matrix_that_is_solved():
    generator = torch.Generator().manual_seed(0)
    keys, wanted, past = (torch.randn(*shape, generator=generator).double() for shape in ((3, 20), (3, 6), (5, 20)))
    half = torch.randn(20, 40, generator=generator).double()
    moment = half @ half.T / 40
    metric = lambda k: torch.linalg.solve(moment, k)  # noqa: E731
    plain = solve_keys(keys, wanted, metric, 2.0, past=PastKeys.of(past, metric))
    grown = solve_keys(keys, wanted, metric, 2.0, past=PastKeys.of(past[:2], metric).extended(past[2:], metric))
    expected = wanted.T @ keys @ torch.linalg.inv(2 * moment + past.T @ past + keys.T @ keys)
    for solved in (plain, grown):
        torch.testing.assert_close(solved.u @ solved.v.T, expected)
    assert PastKeys.of(past, metric).unlike(1.001 * past[1:3]).keys.shape == (20, 3)


@pytest.mark.parametrize("weighting", ["plain_half", "mean", "plain", "both"])
def test_rome_writes_one_fact_exactly_with_the_least_change(weighting):
    model = model_of("llama")
    (delta,) = edit(model, FACTS[:1], ROME(value_settings=STRONG, weighting=weighting)).deltas
    keys, wanted = keys_of(model, weighting=weighting, facts=FACTS[:1]), values_of(model, facts=FACTS[:1])
    whitened = inverse(covariance_of("llama")) @ keys.T
    close(delta, wanted.expand(len(keys), -1).T @ torch.linalg.inv(keys @ whitened) @ whitened.T)
    assert delta.rank == (2 if weighting == "both" else 1)


def test_rome_writes_several_facts_one_after_the_other():
    model = model_of("llama")
    (delta,) = edit(model, editor=ROME(value_settings=STRONG)).deltas
    keys, wanted = keys_of(model), values_of(model)
    by_hand = torch.zeros(32, 64).double()
    for key, shift in zip(keys, wanted, strict=True):
        u = inverse(covariance_of("llama")) @ key
        by_hand += torch.outer(shift - by_hand @ key, u) / (u @ key)
    close(delta, by_hand)


def test_r_rome_aims_at_the_plain_output_from_the_mean_key():
    model = model_of("gpt2")
    (delta,) = edit(model, FACTS[:1], RROME(value_settings=STRONG), family="gpt2").deltas
    found = fact_keys(model, TOKENIZER, list(FACTS[:1]), CONTEXTS, [0], "mean", outputs=True)[0]
    plain = fact_keys(model, TOKENIZER, list(FACTS[:1]), CONTEXTS, [0], "plain", outputs=True)[0]
    key = found.combined[0].double()
    u = inverse(covariance_of("gpt2")) @ key
    shift = plain.outputs[0] + values_of(model, facts=FACTS[:1])[0] - found.outputs[0]
    close(delta, torch.outer(shift, u) / (u @ key))


def test_layers_are_edited_on_what_those_before_them_left():
    model, covariance = of_three_blocks()
    made = edit(model, UNSAID, MEMIT(value_settings=STRONG, ridge=1.0), layers=[0, 1], covariance=covariance)
    first, second = made.deltas
    stream = Site("output", layer=1)

    def streams():
        return EditBench(model, TOKENIZER, [0, 1], CONTEXTS).read(list(UNSAID), [stream], "plain_half").combined(stream).double()

    before, wanted = streams(), values_of(model, layer=1, facts=UNSAID)
    moments = [covariance.moment(layer) for layer in (0, 1)]
    loaded = [moment + 1e-4 * moment.diagonal().mean() * torch.eye(64) for moment in moments]
    keys = keys_of(model, facts=UNSAID)
    close(first, wanted.T / 2 @ keys @ torch.linalg.inv(loaded[0] + keys.T @ keys))
    model.model.layers[0].mlp.down_proj.weight.data += first.change()
    keys, rest = keys_of(model, layer=1, facts=UNSAID), before + wanted - streams()
    torch.testing.assert_close(second.keys.double(), keys, atol=1e-4, rtol=1e-4)
    expected = rest.T @ keys @ torch.linalg.inv(loaded[1] + keys.T @ keys)
    torch.testing.assert_close(second.change().double(), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_layers_before_a_post_norm_cannot_share_an_edit():
    with pytest.raises(EditError, match="one layer"):
        edit(model_of("gemma2"), editor="memit", layers=[0, 1], family="gemma2")


def test_pmet_optimises_attention_too_and_leaves_it_out():
    model, covariance = of_three_blocks()
    settings = ValueSettings(steps=6, clamp=3.0, kl=0.0, weight_decay=0.0, with_attention=True)
    made = edit(model, UNSAID, PMET(value_settings=settings, ridge=1.0), layers=[0, 1], covariance=covariance)
    assert [delta.path.split(".")[-1] for delta in made.deltas] == ["down_proj", "down_proj"]
    bench = EditBench(model, TOKENIZER, [1], CONTEXTS)
    both, alone = (bench.values(list(UNSAID), 1, replace(settings, with_attention=on)) for on in (True, False))
    assert all(bool(one.delta.any()) and bool((one.delta != other.delta).any()) for one, other in zip(both, alone, strict=True))
    keys = keys_of(model, facts=UNSAID)
    wanted = torch.stack([value.delta for value in both]).double()
    moment = covariance.moment(0)
    loaded = moment + 1e-4 * moment.diagonal().mean() * torch.eye(64)
    close(made.deltas[0], wanted.T / 2**0.5 @ keys @ torch.linalg.inv(loaded + keys.T @ keys))
    assert PMET().value_settings.stop_kl == 0.01 and PMET().value_settings.argmax_weight == 0.1


def test_constrained_fine_tuning_stays_within_epsilon():
    model = model_of("llama")
    before = probabilities(model)
    made = edit(model, editor=ConstrainedFT(epsilon=0.02, lr=0.01), covariance=None)
    (delta,) = made.deltas
    assert delta.is_dense and float(delta.change().abs().max()) <= 0.02
    with made.applied(model):
        assert bool((probabilities(model) > before).all())


def test_lora_has_its_rank_and_is_the_same_for_a_seed():
    model = model_of("gpt2")
    before = probabilities(model)
    made = edit(model, editor=LoRA(rank=3, steps=20), covariance=None)
    assert made.rank == 3 and made.digest == edit(model, editor=LoRA(rank=3, steps=20), covariance=None).digest
    assert made.digest != edit(model, editor=LoRA(rank=3, steps=20, seed=1), covariance=None).digest
    with made.applied(model):
        assert bool((probabilities(model) > before).all())
