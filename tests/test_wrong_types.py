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
from steer.intervene import Ablate, Add, Constant, Cosine, Intervention, Plan

V = torch.ones(32)


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


def test_learned_tensors_stay_those_that_the_optimiser_knows():
    operator = Add(V).train()
    plan = Plan(Intervention(operator, "layers.1.output"))
    assert plan.parameters()[0] is operator.tensors["vector"]


def test_directions_are_a_mapping():
    directions = steer.Directions([direction("layers.1.output")], "t", {})
    assert "layers.1.output" in directions and "layers.0.output" not in directions
    assert directions.get("layers.0.output") is None and directions.get("layers.1.output") is directions["layers.1.output"]
