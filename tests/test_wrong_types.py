"""A value of the wrong type is named at the call that got it, not by a traceback from within."""

import numpy as np
import pytest
import torch
from drift.drift_helpers import direction, prompts
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.callbacks import DriftCallback, SteeringCallback
from steer.errors import SteerError
from steer.intervene import (
    Ablate,
    Add,
    CallGate,
    Clamp,
    Constant,
    Cosine,
    CosineGate,
    Erase,
    HeadShift,
    Intervention,
    KSteering,
    Plan,
    ReftR1,
    Rotate,
)

V = torch.ones(32)
PROBE = [torch.ones(5, 32), torch.ones(3, 5)], [torch.zeros(5)]


def one(**options):
    return Intervention(Add(V), "layers.1.output", **options)


WRONG = {
    "a direction for its vector": lambda: Add(direction("layers.1.output")),
    "text for a vector": lambda: Ablate("warm"),
    "no operator": lambda: Intervention(V, "layers.1.output"),
    "strength as text": lambda: one(strength="2.0"),
    "strength None": lambda: one(strength=None),
    "ragged strengths": lambda: one(strength=[1.0, [2.0]]),
    "scope None": lambda: one(scope=None),
    "phases None": lambda: one(phases=None),
    "schedule 3": lambda: one(schedule=3),
    "schedule NaN": lambda: Plan(one(schedule=Constant(float("nan")))),
    "schedule with half a step": lambda: Cosine(steps=2.5),
    "norm kept as text": lambda: one(preserve_norm="no"),
    "gate as text": lambda: one(gate="harm"),
    "gate that never opens": lambda: CosineGate(V, 5.0),
    "gate that is always open": lambda: CosineGate(V, -1.5),
    "plane as text": lambda: Rotate("plane", 0.5),
    "towards as text": lambda: Rotate(torch.eye(2, 32), 0.5, towards="no"),
    "eraser as text": lambda: Erase("left", V, V),
    "clamp at text": lambda: Clamp(V, "mean"),
    "ends of a range for other slots": lambda: Clamp(V, low=torch.zeros(2), high=torch.ones(3)),
    "half a step of a probe": lambda: KSteering(*PROBE, [0], steps=1.5),
    "decay NaN": lambda: KSteering(*PROBE, [0], decay=float("nan")),
    "weights as text": lambda: KSteering(["a", "b"], ["c"], [0]),
    "detection of a token and a half": lambda: ReftR1(V, k=1.5),
    "half a head": lambda: HeadShift(torch.ones(1, 8), [0], 4.5),
    "enabled as text": lambda: one(enabled="no"),
    "plan of None": lambda: Plan(None),
    "plan of an operator": lambda: Plan(Add(V)),
    "plan of vectors": lambda: Plan([V]),
    "step as text": lambda: Plan(one()).step("a"),
    "rows between slots": lambda: Plan(one(strength=[1.0, 2.0])).set_rows([0.7, 1.2]),
    "rows without slots": lambda: Plan(one()).set_rows([0, 0]),
    "attach to a pair": lambda: Plan(one()).attach((FAMILIES["llama"](), tiny_tokenizer())),
    "attach to None": lambda: Plan(one()).attach(None),
    "extract from pairs": lambda: steer.extract(FAMILIES["llama"](), [{"prompt": "a"}], ["embed"], name="t"),
    "pair without a side": lambda: steer.ContrastSet.from_pairs(tiny_tokenizer(), [{"prompt": "the cat", "positive": "good"}]),
    "pair with None": lambda: steer.ContrastSet.from_pairs(tiny_tokenizer(), [{"prompt": "the cat", "positive": "good", "negative": None}]),
    "tracker of a list": lambda: steer.DriftTracker([direction("layers.1.output")], probe=prompts(4)),
    "probe of text": lambda: steer.DriftTracker({"t": [direction("layers.1.output")]}, probe=["hello", "there"]),
    "callback of None": lambda: SteeringCallback(None),
    "callback of a plan": lambda: DriftCallback(Plan(one())),
    "interval as text": lambda: SteeringCallback(Plan(one()), every_n_steps="5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_call_names_it(case):
    with pytest.raises(SteerError) as caught:
        WRONG[case]()
    assert caught.value.remedy and caught.value.found and caught.value.expected


def test_arrays_and_lists_are_vectors():
    assert torch.equal(Add(np.ones(4)).tensors["vector"], Add([1, 1, 1, 1]).tensors["vector"])
    for make, given in (
        (lambda plane: Rotate(plane, 0.5), torch.eye(2, 4)),
        (lambda rows: Erase(rows[0], rows[1], rows[2]), torch.eye(3, 4)),
        (lambda weights: KSteering(weights, [[0.0] * 4], [0]), torch.ones(2, 4, 4)),
    ):
        made, listed = make(given).tensors, make(given.tolist()).tensors
        assert made.keys() == listed.keys() and all(torch.equal(made[name], listed[name]) for name in made)


def test_a_soft_cosine_may_be_learned_beyond_what_a_hard_one_reaches():
    assert CosineGate(V, 1.5, sharpness=2.0).is_soft and not CosineGate(V, 1.0).is_soft


def test_one_intervention_in_two_plans_or_twice_in_one():
    shared = one(name="warm")
    first, second, twice = Plan(shared), Plan([one(name="warm"), shared]), Plan([shared, shared])
    first.set_strength(5.0)
    assert [float(plan.interventions[-1].effective) for plan in (first, second, twice)] == [5.0, 1.0, 1.0]
    assert shared.name == "warm" and [each.name for each in twice.interventions] == ["warm", "warm#2"]
    model = FAMILIES["llama"]()
    with twice.attached(model):
        model(torch.arange(6)[None])
    assert twice.fired() == {"warm": 6, "warm#2": 6}


def test_plans_have_tensors_of_their_own():
    gated = CallGate(lambda h, ctx: h[..., 0], 32, sharpness=2.0)
    given = one(strength=[1.0, 2.0], gate=gated)
    first, second = Plan(given), Plan(given)
    first.set_rows([0, 1])
    copied = Plan(first.interventions)
    first.interventions[0].operator.tensors["vector"].zero_()
    first.interventions[0].gate.tensors["sharpness"].zero_()
    first.set_rows([1, 0])
    for other in (given, second.interventions[0], copied.interventions[0]):
        assert torch.equal(other.operator.tensors["vector"][0], V) and float(other.gate.tensors["sharpness"]) == 2.0
    assert copied.interventions[0].rows.tolist() == [0, 1] and second.interventions[0].rows is None


def test_what_the_interventions_of_a_plan_share_is_copied_once():
    operator = Ablate(V)
    plan = Plan([Intervention(operator, f"layers.{layer}.output") for layer in range(3)])
    own = {id(each.operator.tensors["directions"]) for each in plan.interventions}
    assert len(own) == 1 and id(operator.tensors["directions"]) not in own


def test_learned_tensors_stay_those_that_the_optimiser_knows():
    operator = Add(V).train()
    plan = Plan(Intervention(operator, "layers.1.output"))
    assert plan.parameters()[0] is operator.tensors["vector"]


def test_directions_are_a_mapping():
    directions = steer.Directions([direction("layers.1.output")], "t", {})
    assert "layers.1.output" in directions and "layers.0.output" not in directions
    assert directions.get("layers.0.output") is None and directions.get("layers.1.output") is directions["layers.1.output"]
