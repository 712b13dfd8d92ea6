"""What would give wrong numbers in silence is refused, or done right: targets of other prompts, other models, texts without roles, NaN."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from circuits.circuit_helpers import autoencoder
from circuits.component_helpers import TARGET, ablation_of, pairs, rows
from families import FAMILIES

from steer.circuits import (
    Circuit,
    ComponentEvaluation,
    ComponentScores,
    KeepKL,
    LogitDifference,
    LogProbability,
    Pairs,
    Shift,
    attribute,
    circuit_directions,
    damage,
    feature_circuit,
    information_flow,
    learn_circuit,
    mean_ablation,
    optimal_ablation,
    zero_ablation,
)
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.errors import ConfigError, NonFiniteError, WrongModelError
from steer.intervene import Plan

LONG = [40, 36]  # tokens: longer than the stretches that overlaps are looked for in


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def scores(model) -> ComponentScores:
    return attribute(model, pairs(model), TARGET, method="eap", progress=False)


@pytest.mark.parametrize(
    "target", [LogitDifference([5, 6, 7, 8], 9), LogitDifference(5, [1, 2]), LogProbability([3] * 4), "logit difference", None]
)
def test_tokens_of_other_prompts_are_no_target(model, target):
    uses = [
        lambda: attribute(model, pairs(model), target, progress=False),  # three pairs
        lambda: ComponentRun(model, rows(5, 5, 5), target, zero_ablation()).values([TakenOut.nothing(_graph(model))]),
        lambda: Shift(model, rows(5, 5, 5), rows(4, 4, 4, seed=9), target),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match=r"tokens of a target|is no function"):
            use()


def test_one_token_for_each_prompt_is_a_target(model):
    of_each = LogitDifference([5, 6, 7], [9, 9, 9])
    values = ComponentRun(model, rows(5, 6, 4), of_each, zero_ablation()).values([TakenOut.nothing(_graph(model))])[0]
    for row, right, value in zip(rows(5, 6, 4), of_each.right, values, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, -1]
        assert value == pytest.approx((logits[right] - logits[9]).item(), abs=1e-5)


def test_texts_of_which_no_token_counts_have_neither_mean_nor_score(model):
    nothing = [[None] * 4, [None] * 5]
    with pytest.raises(ConfigError, match="no token of the prompts"):
        mean_ablation(model, rows(4, 5), positions=nothing)
    with pytest.raises(ConfigError, match="no token of the prompts"):
        Pairs.of(model, rows(4, 5), rows(4, 5, seed=9), positions=nothing)
    with pytest.raises(ConfigError, match=r"no mean at a position[\s\S]*none at \[1\]"):
        mean_ablation(model, rows(4, 4), positions=[["a", None, "a", "a"]] * 2, per_position=True)


def test_scores_that_are_not_finite_choose_nothing(model, scores):
    nodes, edges = scores.nodes.clone(), scores.edges.clone()
    nodes[0, 3] = edges[0, 1, -1] = torch.nan
    damaged = replace(scores, nodes=nodes, edges=edges)
    evaluation = ComponentEvaluation(model, pairs(model), TARGET, zero_ablation())
    for choose in (
        lambda: damaged.top_nodes(2),
        lambda: damaged.top_edges(2, absolute=False),
        lambda: evaluation.curve(damaged, shares=(0.5,)),
    ):
        with pytest.raises(NonFiniteError, match="none is higher"):
            choose()
    same = replace(scores, nodes=torch.zeros_like(nodes), edges=torch.zeros_like(edges))
    with pytest.raises(ConfigError, match="all scores of edges are zero"):
        evaluation.curve(same, shares=(0.5,))


def test_a_circuit_of_another_model_is_not_evaluated(model, scores):
    others = [FAMILIES["mistral"](), FAMILIES["llama"](num_attention_heads=8)]
    for other in others:
        evaluation = ComponentEvaluation(other, pairs(other), TARGET, zero_ablation())
        for evaluate in (evaluation.faithfulness, evaluation.completeness, evaluation.minimality):
            with pytest.raises(WrongModelError, match="another model"):
                evaluate(scores.top_edges(80))
        for evaluate in (evaluation.curve, evaluation.exact_effects):
            with pytest.raises(WrongModelError, match="another model"):
                evaluate(scores)
    trained = FAMILIES["llama"]()
    trained.get_input_embeddings().weight.data.add_(0.01)
    assert ComponentEvaluation(trained, pairs(trained), TARGET, zero_ablation()).faithfulness(scores.top_edges(80), draws=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_circuit_is_used_on_a_cast_copy_of_its_model_with_a_warning(dtype, tmp_path):
    """Found in float32, deployed in bfloat16: nodes and edges do there what they do here. Other weights are refused in any type."""
    model = FAMILIES["llama"]()
    circuit = Circuit.of_nodes(model, ["a1.h2", "m2"]).with_ablation(zero_ablation())
    circuit = Circuit.load(replace(circuit, edges=circuit.nodes[:, None].bool() & circuit.graph.possible).save(tmp_path / "circuit"))
    cast, other = FAMILIES["llama"]().to(dtype), FAMILIES["llama"]()
    other.get_input_embeddings().weight.data.add_(0.01)
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.warns(UserWarning, match=rf"circuit was made on[\s\S]*is a {str(dtype).removeprefix('torch.')} copy"):
        plan = circuit.ablation_plan(cast)
    with torch.no_grad():
        for attached in (lambda of: plan.attached(of), lambda of: circuit.edges_ablated(of)):
            with warnings.catch_warnings(), attached(model):
                warnings.simplefilter("ignore")
                expected = model(ids).logits
            with warnings.catch_warnings(), attached(cast):
                warnings.simplefilter("ignore")
                found = cast(ids).logits.float()
            assert float((found - expected).abs().max()) < 0.05 * float((model(ids).logits - expected).abs().max())
    for narrow in (other, other.to(dtype)):
        with pytest.raises(WrongModelError, match="another model"):
            circuit.ablation_plan(narrow)


def test_constants_of_another_model_are_refused_whoever_takes_them(model, scores):
    """They have the widths of this one's, and would be taken for its means."""
    other = FAMILIES["llama"]()
    other.get_input_embeddings().weight.data.add_(0.01)
    foreign = mean_ablation(other, rows(5, 8))
    nodes, edges = (circuit.with_ablation(foreign) for circuit in (scores.top_nodes(2), scores.top_edges(20)))
    for use in (
        lambda: nodes.ablation_plan(model),
        lambda: edges.edges_ablated(model),
        lambda: ComponentEvaluation(model, pairs(model), TARGET, foreign),
        lambda: attribute(model, pairs(model), TARGET, method="eap", ablation=foreign, progress=False),
    ):
        with pytest.raises(WrongModelError, match="constants of this mean ablation"):
            use()
    with pytest.warns(UserWarning, match="bfloat16"):
        nodes.with_ablation(mean_ablation(FAMILIES["llama"](), rows(5, 8))).ablation_plan(FAMILIES["llama"]().bfloat16())


def test_a_plan_of_a_circuit_knows_its_model(scores, tmp_path):
    model, other = FAMILIES["llama"](), FAMILIES["llama"]()
    other.get_input_embeddings().weight.data.add_(0.01)
    plan = Plan.load(scores.top_nodes(2).with_ablation(zero_ablation()).ablation_plan(model).save(tmp_path / "plan"))
    with pytest.warns(UserWarning, match="embeddings differ"):
        plan.attach(other).detach()


def test_a_plan_of_a_circuit_of_edges_says_that_it_ablates_nodes(model, scores):
    with pytest.warns(UserWarning, match="edges_ablated cuts its own alone") as told:
        scores.top_edges(20).with_ablation(zero_ablation()).ablation_plan(model)
    assert told[0].filename == __file__


def test_what_is_measured_under_an_attached_plan_says_so(model, scores):
    """A plan that was not taken off would be in every number."""
    evaluation = ComponentEvaluation(model, pairs(model), TARGET, zero_ablation())
    plan = scores.top_nodes(1).with_ablation(zero_ablation()).ablation_plan(model)
    with plan.attached(model) as attachment:
        for measure in (
            lambda: attribute(model, pairs(model), TARGET, method="eap", edges=False, progress=False),
            lambda: evaluation.faithfulness(scores.top_nodes(2), draws=0),
            lambda: mean_ablation(model, rows(5, 8)),
        ):
            with pytest.warns(UserWarning, match=r"a plan is attached to this model \('layers_[\s\S]*as it is steered"):
                measure()
        attachment.enable(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mean_ablation(model, rows(5, 8))


def test_a_circuit_that_does_not_say_its_model_has_to_have_its_heads():
    model, other = FAMILIES["llama"](), FAMILIES["llama"](num_attention_heads=8)
    unnamed = replace(Circuit.of_nodes(model, ["a1.h2"]).with_ablation(zero_ablation()), facts={})
    assert unnamed.check_model(model)
    with pytest.raises(WrongModelError, match="another model"):
        unnamed.ablation_plan(other)


def test_amounts_and_masks_have_to_fit(model):
    circuit = Circuit.of_nodes(model, ["a1.h2"])
    with pytest.raises(ConfigError, match="`neurons` of a circuit"):
        replace(circuit, neurons={7: torch.ones(64, dtype=torch.float64)})
    with pytest.raises(ConfigError, match=r"torch\.bool"):
        replace(circuit, edges=circuit.graph.possible.double())
    with pytest.raises(NonFiniteError, match="amounts of the nodes"):
        replace(circuit, nodes=circuit.nodes * torch.nan)
    with pytest.raises(ConfigError, match="the ablation of a circuit"):
        circuit.with_ablation("zero")
    for names in ("a1.h2", 3):
        with pytest.raises(ConfigError, match="the nodes of a circuit"):
            Circuit.of_nodes(model, names)


def test_the_control_of_a_circuit_with_the_input_has_the_input(model):
    drawn = Circuit.of_nodes(model, ["input", "a1.h2", "m0"]).random(0)
    assert [name[0] for name in drawn.node_names] == ["i", "a", "m"] and drawn.node_names[1:] != ["a1.h2", "m0"]


@pytest.mark.filterwarnings("ignore:damage on", "ignore:the constants")
def test_damage_knows_every_text_that_chose_a_circuit(model):
    ablation = ablation_of(model, "zero")
    seen = rows(*LONG, seed=3)

    def of(chosen):
        return attribute(model, Pairs.of(model, chosen, [row.__class__(row.ids[::-1], 0) for row in chosen]), TARGET, progress=False)

    joined = of(rows(*LONG, seed=70)).joined(of(seen)).top_nodes(2)
    flowed = information_flow(model, seen, progress=False).top_edges(80)
    learned = learn_circuit(model, [KeepKL(seen)], Circuit.of_nodes(model, ["a1.h2"]), ablation=ablation, steps=1, least=0, progress=False)
    again = learn_circuit(model, [KeepKL(rows(9))], joined, ablation=ablation, steps=1, least=0, progress=False)
    for circuit in (joined, flowed, learned, again):
        with pytest.raises(ConfigError, match="that chose the circuit"):
            damage(model, circuit.with_ablation(ablation), {"news": seen}, draws=0)
        assert damage(model, circuit.with_ablation(ablation), {"news": rows(*LONG, seed=11)}, draws=0).facts["overlap_checked"]


def test_ctrl_c_while_gates_are_learned_is_ctrl_c(model):
    calls = []

    def stopped(logits, prompt):
        calls.append(prompt)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return logits[-1, 5] - logits[-1, 9]

    candidates = Circuit.of_nodes(model, ["a1.h2"]).with_ablation(zero_ablation())
    with pytest.raises(KeyboardInterrupt):
        learn_circuit(model, [Shift(model, rows(5, 5), rows(4, 4), stopped)], candidates, steps=4, progress=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_needs_gradients_has_them_in_the_inference_mode_of_a_caller(model):
    circuit = Circuit.of_nodes(model, ["a1.h2"]).with_ablation(mean_ablation(model, rows(6, 5)))

    def found():
        learned = learn_circuit(model, [Shift(model, rows(5), rows(5, seed=3), TARGET)], circuit, steps=2, progress=False)
        optimal = optimal_ablation(model, circuit, rows(8), steps=2, progress=False)
        directions = circuit_directions(model, circuit, rows(6), TARGET)
        return [learned.nodes, *optimal.values.values(), directions["layers.1.attn.z"].vector]

    expected = found()
    with torch.inference_mode():
        inside = found()
    for a, b in zip(inside, expected, strict=True):
        assert torch.equal(a, b) and not a.is_inference()
    features = {"a": autoencoder()}
    with torch.inference_mode():
        of_features = feature_circuit(model, features, rows(5, 4), TARGET, evaluate=False)
    assert repr(of_features) == repr(feature_circuit(model, features, rows(5, 4), TARGET, evaluate=False))


def test_nothing_to_try_or_to_draw_is_told(model, scores):
    evaluation = ComponentEvaluation(model, pairs(model), TARGET, zero_ablation())
    circuit = scores.top_edges(80)
    for evaluate in (
        lambda: evaluation.curve(scores, shares=()),
        lambda: evaluation.curve(scores, shares=(0.5,), draws=-1),
        lambda: evaluation.minimality(circuit, most=0),
        lambda: evaluation.minimality(circuit, knock_outs=-1),
        lambda: evaluation.completeness(circuit, candidates=0),
    ):
        with pytest.raises(ConfigError):
            evaluate()


def _graph(model):
    return Circuit.of_nodes(model, ["input"]).graph
