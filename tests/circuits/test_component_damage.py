"""Damage is the change of the loss on texts that nothing was fitted on; optimal constants change a model less than means do."""

import math

import pytest
import torch
from circuits.component_helpers import TARGET, ablation_of, cut, pairs, rows, run_of
from hand import hook_count

from steer.circuits import Circuit, attribute, damage, mean_ablation, optimal_ablation, resample_ablation
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.text_overlap import WINDOW, overlapping, window_hashes
from steer.circuits.texts import Texts
from steer.errors import ConfigError
from steer.model.text_loss import TextLosses, loss_change, pooled_change, text_losses
from steer.model.tokens import Row

FEW = pytest.mark.filterwarnings("ignore:damage on", "ignore:the constants")


def circuit_of(model, *names: str) -> Circuit:
    return Circuit.of_nodes(model, names or ["a0.h1", "m1"]).with_ablation(ablation_of(model, "mean"))


def sources() -> dict[str, list[Row]]:
    return {"a": rows(9, 12, 7, seed=200), "b": rows(8, 10, seed=300), "c": rows(11, 6, seed=400)}


# ---- losses


def test_losses_are_those_of_the_texts_alone(tiny):
    model = tiny("llama")
    texts = [*rows(9, 5), Row(rows(7, seed=9)[0].ids, 4)]
    found = text_losses(model, texts)
    expected = []
    for row in texts:
        batch = torch.tensor([row.ids])
        labels = batch.clone()
        labels[:, : row.prompt] = -100
        with torch.no_grad():
            expected.append(model(batch, labels=labels).loss.item())
    assert found.tokens.tolist() == [8, 4, 3]
    assert (found.nats / found.tokens).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="text 1"):
        text_losses(model, [*rows(5), Row((4,), 0)])


def test_the_interval_of_texts_of_one_length_is_that_of_a_mean():
    changes = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    tokens = torch.full((4,), 10)
    zero = TextLosses(torch.zeros(4).double(), tokens)
    found = loss_change(zero, TextLosses(changes, tokens))
    half = 3.182446 * changes.std().item() / 2 / 10
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), rel=1e-5)
    assert math.isnan(loss_change(TextLosses(torch.ones(1), tokens[:1]), TextLosses(torch.ones(1), tokens[:1])).low)


def test_the_interval_holds_what_it_says_where_texts_differ_in_length():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        tokens = torch.randint(20, 200, (25,), generator=generator)
        nats = tokens * 0.05 + tokens.double().sqrt() * torch.randn(25, generator=generator, dtype=torch.float64)
        zero = TextLosses(torch.zeros(25).double(), tokens)
        found = pooled_change([zero, zero], [TextLosses(nats, tokens), TextLosses(nats.flip(0) * 0 + tokens * 0.05, tokens)])
        covered += found.low <= 0.05 <= found.high
    assert covered / 400 == pytest.approx(0.95, abs=0.035)


# ---- damage


@FEW
def test_damage_is_the_change_of_the_loss_by_source(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    found = damage(model, circuit, sources(), draws=2)
    before = {name: text_losses(model, texts) for name, texts in sources().items()}
    with circuit.ablation_plan(model).attached(model):
        after = {name: text_losses(model, texts) for name, texts in sources().items()}
    for name, change in found.by_source.items():
        assert change.value == pytest.approx(after[name].per_token - before[name].per_token, abs=1e-9)
        assert change.low < change.value < change.high
    tokens = sum(int(each.tokens.sum()) for each in before.values())
    total = sum(float((after[name].nats - before[name].nats).sum()) for name in before)
    assert found.pooled.value == pytest.approx(total / tokens) and found.pooled.tokens == tokens
    assert len(found.random) == 2 and found.random[0] != found.random[1] and "random" in repr(found)
    assert damage(model, circuit, sources(), strength=0, draws=0).pooled.value == pytest.approx(0, abs=1e-6)
    plan = damage(model, circuit.ablation_plan(model), sources())
    assert plan.pooled == found.pooled and plan.random == () and plan.facts["overlap_checked"] == []
    assert hook_count(model) == 0


@FEW
def test_damage_of_edges_is_that_of_the_edges(tiny):
    model = tiny("llama")
    run = run_of(model)
    edges = cut(run, "a0.h1->m1", "m0->a1.h2<q>")
    circuit = Circuit(run.graph, edges.any(1).double(), edges=edges, ablation=ablation_of(model, "mean"))
    found = damage(model, circuit, sources(), draws=0)
    with circuit.edges_ablated(model):
        after = text_losses(model, sources()["b"])
    assert found.by_source["b"].value == pytest.approx(after.per_token - text_losses(model, sources()["b"]).per_token, abs=1e-9)


@FEW
def test_texts_that_the_ablation_or_the_choice_has_seen_are_refused(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    with pytest.raises(ConfigError, match=r"'b' are among the constants.*\n.*\n.*1 of 3"):
        damage(model, circuit, {**sources(), "b": [*rows(8, 10, seed=300), rows(5, 8, 7, seed=90)[1]]})
    both = pairs(model)
    chosen = attribute(model, both, TARGET, method="eap", edges=False, progress=False).top_nodes(2).with_ablation(circuit.ablation)
    with pytest.raises(ConfigError, match="the pairs that chose the circuit"):
        damage(model, chosen, {**sources(), "c": both.corrupted.rows[1:]})
    assert damage(model, chosen, sources(), draws=0).facts["overlap_checked"] == [
        "the constants of the ablation",
        "the pairs that chose the circuit",
    ]
    with pytest.raises(ConfigError, match="no text"):
        damage(model, circuit, {"a": []})
    with pytest.raises(ConfigError, match="strengths of its own"):
        damage(model, circuit.ablation_plan(model), sources(), strength=0.5)


def test_a_shared_stretch_is_found_wherever_it_begins():
    (text,) = rows(4 * WINDOW)
    (other,) = rows(4 * WINDOW, seed=5)
    shifted = Row(other.ids[:7] + text.ids[11 : 11 + 2 * WINDOW] + other.ids[7:], 0)
    assert overlapping([other, shifted, text], window_hashes([text])) == [1, 2]
    assert overlapping([Row(text.ids[: WINDOW - 1], 0)], window_hashes([text])) == []
    assert len(window_hashes([text, text])) == 4


def test_too_little_text_is_said(tiny):
    model = tiny("llama")
    with pytest.warns(UserWarning) as caught:
        damage(model, circuit_of(model), {"a": rows(9, 8, seed=200)}, draws=0)
    words = [str(warning.message) for warning in caught]
    assert any("17 tokens of 1 sources" in each for each in words) and any("come from 20 tokens" in each for each in words)


# ---- optimal ablation


@pytest.mark.parametrize("all_but", [False, True])
def test_optimal_constants_change_the_model_less_than_means(tiny, all_but: bool):
    model = tiny("llama")
    texts = rows(8, 8, 6, seed=500)
    circuit = circuit_of(model, "a0.h1", "a1.h2", "m1")
    found = optimal_ablation(model, circuit, texts, all_but=all_but, steps=40, lr=0.05, progress=False)
    assert found.kind == "optimal" and found.facts["after"] < 0.9 * found.facts["before"]
    mean = mean_ablation(model, texts)
    changed = {str(site) for site, value in found.values.items() if not torch.equal(value, mean.values[site])}
    assert "layers.1.mlp.output" in changed if not all_but else "layers.2.mlp.output" in changed
    assert all(parameter.grad is None for parameter in model.parameters()) and hook_count(model) == 0
    with circuit.with_ablation(found).ablation_plan(model).attached(model):
        assert torch.isfinite(model(torch.tensor([texts[0].ids])).logits).all()


def test_optimal_constants_of_edges_lower_the_change_of_a_target(tiny):
    model = tiny("llama")
    both = pairs(model)
    run = run_of(model)
    edges = cut(run, "m0->", "a1.h0->logits", "input->m1")
    circuit = Circuit(run.graph, edges.any(1).double(), edges=edges)
    found = optimal_ablation(model, circuit, both, TARGET, steps=30, lr=0.05, progress=False)

    def change(ablation) -> float:
        of = ComponentRun(model, Texts(both.clean.rows), TARGET, ablation)
        full, without = of.values([TakenOut.nothing(of.graph), TakenOut.circuit(circuit)])
        return float((without - full).square().mean())

    assert change(found) == pytest.approx(found.facts["after"], rel=1e-3)
    assert change(mean_ablation(model, both.clean.rows)) == pytest.approx(found.facts["before"], rel=1e-3)
    assert found.facts["after"] < found.facts["before"]
    assert found.facts["objective"] == "squared change of the logit difference"


def test_an_optimal_ablation_of_nothing_or_from_no_constants_is_refused(tiny):
    model = tiny("llama")
    nothing = Circuit(circuit_of(model).graph, torch.zeros(16))
    with pytest.raises(ConfigError, match="nothing to ablate"):
        optimal_ablation(model, nothing, rows(5))
    with pytest.raises(ConfigError, match="resample"):
        optimal_ablation(model, circuit_of(model), rows(5), start=resample_ablation())
