"""Evaluation of circuits: in a model whose edges to the logits add up, all figures are known by hand."""

import math

import pytest
import torch
from circuits.component_helpers import TARGET, ablation_of, cut, pairs, rows
from families import FAMILIES
from torch import nn

from steer.circuits import Circuit, ComponentEvaluation, FaithfulnessCurve, attribute, resample_ablation, zero_ablation
from steer.circuits.component_results import SHARES
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy


@pytest.fixture
def additive():
    """A llama of one block without a final norm: the target is a sum over edges to the logits."""
    model = FAMILIES["llama"](num_hidden_layers=1).double()
    model.model.norm = nn.Identity()
    return model


def evaluation_of(model, kind: str = "zero") -> ComponentEvaluation:
    return ComponentEvaluation(model, pairs(model), TARGET, ablation_of(model, kind))


def scores_of(model, kind: str = "zero"):
    return attribute(model, pairs(model), TARGET, method="eap", ablation=ablation_of(model, kind), progress=False)


def circuit_of(evaluation: ComponentEvaluation, *names: str) -> Circuit:
    """Of all edges into block 0 and these."""
    graph = evaluation.run.graph
    edges = cut(evaluation.run, *names)
    edges[0, : graph.readers_at(0)["mlp"].stop] = True  # from the input
    edges |= cut(evaluation.run, "a0.h0->m0", "a0.h1->m0", "a0.h2->m0", "a0.h3->m0")
    return Circuit(graph, edges.any(1).double(), edges=edges, facts={"model": Anatomy.find(evaluation.run.passes.model).fingerprint()})


OUT = ("input->logits", "a0.h0->logits", "a0.h1->logits", "a0.h3->logits")  # all but a0.h2 and m0


def test_faithfulness_is_the_sum_of_the_edges_that_are_kept(additive):
    evaluation, scores = evaluation_of(additive), scores_of(additive)
    found = evaluation.faithfulness(circuit_of(evaluation, *OUT), draws=2, seed=3)
    lost = scores["a0.h2->logits"] + scores["m0->logits"]
    difference = float((found.full - found.empty).mean())
    assert found.faithfulness == pytest.approx(1 - lost / difference, rel=1e-4)
    assert (found.share("full"), found.share("empty")) == (1, 0)
    everything = Circuit(evaluation.run.graph, torch.ones(len(evaluation.run.graph.writers)), edges=evaluation.run.graph.possible)
    assert evaluation.faithfulness(everything, draws=0).faithfulness == 1
    ratios = (found.circuit - found.empty) / (found.full - found.empty)
    assert found.mean_of_ratios("circuit") == pytest.approx(ratios.mean().item())
    assert found.mean_of_ratios("circuit") != pytest.approx(found.faithfulness, abs=1e-3)


def test_random_circuits_are_of_the_same_size_and_come_again_by_their_seed(tiny):
    model = tiny("llama")
    evaluation = evaluation_of(model, "resample")
    circuit = scores_of(model, "mean").top_edges(60)
    found = [evaluation.faithfulness(circuit, draws=2, seed=seed) for seed in (0, 0, 7)]
    assert torch.equal(found[0].random, found[1].random) and not torch.equal(found[0].random, found[2].random)
    assert found[0].random.shape == (2, 3)
    drawn = circuit.random(0)
    assert int(drawn.edges.sum()) == int(circuit.edges.sum()) and not bool((drawn.edges & circuit.edges).any())
    assert "random" in repr(found[0])


def test_a_circuit_of_nodes_is_measured_against_its_kinds_of_nodes(tiny):
    model = tiny("llama")
    evaluation = evaluation_of(model, "mean")
    heads = [writer.name for writer in evaluation.run.graph.writers if writer.kind == "head"]
    found = evaluation.faithfulness(Circuit.of_nodes(model, heads), draws=0)
    assert found.faithfulness == 1 and found.facts["kinds"] == ["head"]
    assert found.share("without_circuit") == pytest.approx(0, abs=1e-6)  # without all heads is with nothing
    assert math.isnan(found.random_faithfulness)


def test_completeness_of_parts_that_add_up_is_what_the_circuit_lacks(additive):
    evaluation = evaluation_of(additive)
    scores = scores_of(additive)
    circuit = circuit_of(evaluation, *OUT)
    whole = Circuit(evaluation.run.graph, circuit.nodes, edges=cut(evaluation.run, *OUT))  # knock-outs of edges to the logits alone
    lacks = abs(scores["a0.h2->logits"] + scores["m0->logits"])

    def knock_outs(names):
        return torch.stack([torch.tensor(evaluation.run.graph.writer_place(n) * len(evaluation.run.graph.readers)) for n in names])

    last = len(evaluation.run.graph.readers) - 1
    sets = [knock_outs(["input"]) + last, knock_outs(["a0.h0", "a0.h3"]) + last]
    assert evaluation._incomplete(circuit, sets).tolist() == pytest.approx([lacks, lacks], abs=1e-4)
    found = evaluation.completeness(whole, knock_outs=3, greedy=2, candidates=2, draws=1, seed=1)
    assert found.differences.shape == (3,) and found.random.shape == (1, 3) and len(found.worst) == 2
    assert set(found.worst) <= set(OUT)
    assert "greedy worst" in repr(found)


def test_the_greedy_set_is_no_better_than_the_best_single_one(tiny):
    model = tiny("llama")
    evaluation = evaluation_of(model, "mean")
    circuit = Circuit.of_nodes(model, ["a0.h1", "a1.h0", "a2.h3", "a0.h2"])
    found = evaluation.completeness(circuit, knock_outs=1, greedy=3, candidates=10, draws=0)
    alone = evaluation._incomplete(circuit, [torch.tensor([evaluation.run.graph.writer_place(name)]) for name in circuit.node_names])
    assert float(found.worst_differences[0]) == pytest.approx(float(alone.max()))
    assert found.worst[0] == circuit.node_names[int(alone.argmax())]


def test_minimality_is_what_each_edge_adds(additive):
    evaluation, scores = evaluation_of(additive), scores_of(additive)
    found = evaluation.minimality(circuit_of(evaluation, *OUT), knock_outs=0, draws=1)
    changes = dict(zip(found.names, found.changes.tolist(), strict=True))
    for name in OUT:
        assert changes[name] == pytest.approx(abs(scores[name]), abs=1e-4)
    assert "least" in repr(found)
    with_sets = evaluation.minimality(circuit_of(evaluation, *OUT), knock_outs=2, draws=0)
    assert (with_sets.changes >= found.changes - 1e-9).all()


def test_areas_are_those_of_the_trapezoids():
    values = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.5, 1.5], [1.0, 1.0]], dtype=torch.float64)  # [shares, prompts]
    curve = FaithfulnessCurve((0.1, 0.2, 0.5, 1.0), (1, 2, 5, 10), torch.ones(2).double(), torch.zeros(2).double(), values, values[None])
    assert curve.faithfulness.tolist() == [0.5, 1, 1.5, 1]
    assert curve.cpr == pytest.approx(0.1 * 0.75 + 0.3 * 1.25 + 0.5 * 1.25)
    assert curve.cmd == pytest.approx(0.1 * 0.25 + 0.3 * 0.25 + 0.5 * 0.25)
    assert curve.random_cpr.tolist() == pytest.approx([curve.cpr])


def test_the_curve_ends_at_the_model(tiny):
    model = tiny("llama")
    evaluation, scores = evaluation_of(model, "resample"), scores_of(model, "mean")
    curve = evaluation.curve(scores, draws=1, seed=2)
    assert curve.shares == SHARES and curve.sizes[-1] == evaluation.run.graph.n_edges
    assert curve.faithfulness[-1] == 1 and curve.random_faithfulness[0, -1] == 1
    share = 0.2
    kept = scores.top_edges(int(share * evaluation.run.graph.n_edges))
    expected = evaluation.faithfulness(kept, draws=0).faithfulness
    assert float(curve.faithfulness[SHARES.index(share)]) == pytest.approx(expected, abs=1e-6)
    signed = evaluation.curve(scores, absolute=False, shares=(0.05, 0.2, 1), draws=0)
    assert not torch.allclose(signed.faithfulness[:2], curve.faithfulness[[5, 7]])
    assert signed.facts["absolute"] is False and curve.facts["ablation"]["kind"] == "resample"
    with pytest.raises(ConfigError, match="ascend"):
        evaluation.curve(scores, shares=(0.5, 0.1))


def test_exact_effects_of_parts_that_add_up_are_their_scores(additive):
    evaluation, scores = evaluation_of(additive), scores_of(additive)
    graph = evaluation.run.graph
    found = evaluation.exact_effects(scores, graph.n_edges, edges=True)
    effects = dict(zip(found.names, found.exact.tolist(), strict=True))
    for name in (*OUT, "m0->logits"):
        assert effects[name] == pytest.approx(scores[name], abs=1e-4)
    assert repr(found).startswith(f"ExactEffects({graph.n_edges} edges, correlation {found.correlation:.3f}")
    nodes = evaluation.exact_effects(scores, 5, seed=4)
    assert len(nodes.names) == 5 and "5 nodes" in repr(nodes)
    assert nodes.names == evaluation.exact_effects(scores, 5, seed=4).names
    with pytest.raises(ConfigError, match="more exact effects"):
        evaluation.exact_effects(scores, 1000)


def test_what_was_measured_stays_with_the_circuit_and_its_file(tiny, tmp_path):
    model = tiny("llama")
    evaluation = evaluation_of(model, "mean")
    circuit = scores_of(model, "mean").top_edges(40)
    result = evaluation.faithfulness(circuit, draws=1)
    again = Circuit.load(result.recorded_in(circuit).save(tmp_path / "circuit"))
    facts = again.facts["evaluation"]
    assert facts["faithfulness"]["circuit"] == pytest.approx(result.faithfulness)
    assert facts["ablation"]["kind"] == "mean" and facts["ablation"]["per_position"] is False and facts["of"] == "edges"
    assert facts["average"].startswith("ratio of means") and facts["draws"] == 1 and facts["prompts"] == 3


def test_an_empty_circuit_and_missing_counterfactuals_are_refused(tiny):
    model = tiny("llama")
    evaluation = evaluation_of(model, "zero")
    empty = Circuit(evaluation.run.graph, torch.zeros(len(evaluation.run.graph.writers)))
    for measure in (evaluation.faithfulness, evaluation.completeness, evaluation.minimality):
        with pytest.raises(ConfigError, match="empty"):
            measure(empty)
    with pytest.raises(ConfigError, match="counterfactual"):
        ComponentEvaluation(model, pairs(model).clean, TARGET, resample_ablation())
    assert ComponentEvaluation(model, rows(6, 6, 4), TARGET, zero_ablation()).run.values([]).shape == (0, len(rows(1, 1, 1)))
