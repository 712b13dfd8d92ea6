"""A value of the wrong type is named at the call that got it, not by a traceback from within."""

import numpy as np
import pytest
import torch
from drift.drift_helpers import direction, prompts
from families import FAMILIES
from hand import attachment_of
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.callbacks import DriftCallback, EditCallback, SteeringCallback
from steer.checks import of_type, tensor_of, whole_number
from steer.edits import Edit, EditedWeights, WeightDelta, to_adapter
from steer.errors import ConfigError, SteerError
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
from steer.model.tokens import Row, encode, encode_chat, plain

V = torch.ones(32)
PROBE = [torch.ones(5, 32), torch.ones(3, 5)], [torch.zeros(5)]


def intervention(**options):
    return Intervention(Add(V), "layers.1.output", **options)


MODEL, TOKENIZER, NAN = FAMILIES["llama"](), tiny_tokenizer(), float("nan")
WARM = steer.Direction("layers.1.output", V, "m", "response", {"activation_norm": 1.0})
WARMS = steer.Directions([WARM], "warm", {})
NOUNS = ("cat", "dog", "sun", "moon", "fire", "water")
PAIRS = [{"prompt": f"where is the {noun}", "positive": "good", "negative": "bad"} for noun in NOUNS]
CONTRAST = steer.ContrastSet.from_pairs(TOKENIZER, PAIRS)
NEUTRAL = [plain(TOKENIZER, "the sun and the moon"), plain(TOKENIZER, "a cat sat on the mat")]
UNKNOWN = steer.ContrastSet(*(tuple(Row((3, 500 + i, side), 1) for i in range(6)) for side in (4, 5)), True)


def extract(contrast=CONTRAST, **options):
    return steer.extract(MODEL, contrast, ["layers.1.output"], name="t", progress=False, **options)


def dose_curve(of=WARM, neutral=(), **options):
    return steer.dose_curve(MODEL, of, CONTRAST, neutral or NEUTRAL, progress=False, **options)


def select(candidates=(WARM,), tokens=(5,), showing=(), **options):
    return steer.select(MODEL, candidates, showing=showing or prompts(2), lacking=prompts(2), tokens=tokens, progress=False, **options)


def screen(of=WARM, **options):
    return steer.screen(MODEL, of, CONTRAST, progress=False, **options)


def train(**options):
    return steer.train_direction(MODEL, CONTRAST, "layers.1.output", name="t", method="bipo", progress=False, **options)


def annotate(annotation, tensor):
    with annotation(MODEL, tensor):
        pass


WRONG = {
    "a direction for its vector": lambda: Add(direction("layers.1.output")),
    "text for a vector": lambda: Ablate("warm"),
    "no operator": lambda: Intervention(V, "layers.1.output"),
    "strength as text": lambda: intervention(strength="2.0"),
    "strength None": lambda: intervention(strength=None),
    "ragged strengths": lambda: intervention(strength=[1.0, [2.0]]),
    "scope None": lambda: intervention(scope=None),
    "phases None": lambda: intervention(phases=None),
    "schedule 3": lambda: intervention(schedule=3),
    "schedule NaN": lambda: Plan(intervention(schedule=Constant(float("nan")))),
    "schedule with half a step": lambda: Cosine(steps=2.5),
    "norm kept as text": lambda: intervention(preserve_norm="no"),
    "gate as text": lambda: intervention(gate="harm"),
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
    "enabled as text": lambda: intervention(enabled="no"),
    "plan of None": lambda: Plan(None),
    "plan of an operator": lambda: Plan(Add(V)),
    "plan of vectors": lambda: Plan([V]),
    "step as text": lambda: attachment_of(Plan(intervention())).step("a"),
    "rows between slots": lambda: attachment_of(Plan(intervention(strength=[1.0, 2.0]))).set_rows([0.7, 1.2]),
    "rows without slots": lambda: attachment_of(Plan(intervention())).set_rows([0, 0]),
    "attach to a pair": lambda: Plan(intervention()).attach((FAMILIES["llama"](), tiny_tokenizer())),
    "attach to None": lambda: Plan(intervention()).attach(None),
    "extract from pairs": lambda: steer.extract(FAMILIES["llama"](), [{"prompt": "a"}], ["embed"], name="t"),
    "pair without a side": lambda: steer.ContrastSet.from_pairs(tiny_tokenizer(), [{"prompt": "the cat", "positive": "good"}]),
    "pair with None": lambda: steer.ContrastSet.from_pairs(tiny_tokenizer(), [{"prompt": "the cat", "positive": "good", "negative": None}]),
    "tracker of a list": lambda: steer.DriftTracker([direction("layers.1.output")], probe=prompts(4)),
    "probe of text": lambda: steer.DriftTracker({"t": [direction("layers.1.output")]}, probe=["hello", "there"]),
    "callback of None": lambda: SteeringCallback(None),
    "callback of a plan": lambda: DriftCallback(Plan(intervention())),
    "interval as text": lambda: SteeringCallback(Plan(intervention()), every_n_steps="5"),
    "method as list": lambda: extract(method=["caa"]),
    "no methods": lambda: steer.extract_all(MODEL, CONTRAST, ["embed"], name="t", methods=[]),
    "methods as text": lambda: steer.extract_all(MODEL, CONTRAST, ["embed"], name="t", methods="caa"),
    "holdout as text": lambda: extract(holdout="a"),
    "holdout NaN": lambda: extract(holdout=NAN),
    "seed as text": lambda: extract(seed="a"),
    "extract from no model": lambda: steer.extract(None, CONTRAST, ["embed"], name="t"),
    "tokens outside the vocabulary": lambda: extract(UNKNOWN),
    "pairs outside the vocabulary": lambda: steer.screen(MODEL, WARM, UNKNOWN),
    "capture text": lambda: steer.capture(MODEL, ["hello"], {}),
    "dose curve at one number": lambda: dose_curve(doses=0.1),
    "dose curve at text": lambda: dose_curve(doses="0.1"),
    "dose curve at NaN": lambda: dose_curve(doses=[NAN]),
    "dose curve Directions": lambda: dose_curve(WARMS),
    "dose curve a vector": lambda: dose_curve(V),
    "dose curve pairs": lambda: steer.dose_curve(MODEL, WARM, PAIRS, NEUTRAL),
    "neutral text": lambda: dose_curve(neutral=["hello"]),
    "neutral text of one token": lambda: dose_curve(neutral=[Row((5,), 0)]),
    "budget as text": lambda: dose_curve(max_kl="a"),
    "budget below 0": lambda: dose_curve(max_kl=-1),
    "budget of perplexity NaN": lambda: dose_curve(max_perplexity_ratio=NAN),
    "share above 1": lambda: dose_curve(share=2.0),
    "screen at 0": lambda: screen(dose=0),
    "screen at text": lambda: screen(dose="a"),
    "screen at a list": lambda: screen(dose=[0.1]),
    "screen Directions": lambda: screen(WARMS),
    "select among Directions": lambda: select(WARMS),
    "select one": lambda: select(WARM),
    "select vectors": lambda: select([V]),
    "opening token as number": lambda: select(tokens=5),
    "opening token as text": lambda: select(tokens=["yes"]),
    "half an opening token": lambda: select(tokens=[5.9]),
    "opening token below 0": lambda: select(tokens=[-95]),
    "opening token outside the vocabulary": lambda: select(tokens=[96]),
    "every token opens": lambda: select(tokens=list(range(96))),
    "prompts as text": lambda: select(showing=["hi"]),
    "last layers as text": lambda: select(last="a"),
    "KL NaN": lambda: select(max_kl=NAN),
    "learning rate NaN": lambda: train(learning_rate=NAN),
    "learning rate as text": lambda: train(learning_rate="a"),
    "steps as text": lambda: train(steps="a"),
    "batch of half a pair": lambda: train(batch_size=0.5),
    "train on pairs of text": lambda: steer.train_direction(MODEL, PAIRS, "embed", name="t", method="bipo"),
    "row of text": lambda: Row("abc", 1),
    "row with a token below 0": lambda: Row((1, -2), 1),
    "row with half a token": lambda: Row((1, 2.5), 1),
    "prompt longer than its row": lambda: Row((1, 2), 5),
    "prompt below 0": lambda: Row((1, 2), -1),
    "contrast of text": lambda: steer.ContrastSet(("a",), ("b",), True),
    "paired as text": lambda: steer.ContrastSet(CONTRAST.positive, CONTRAST.negative, "no"),
    "sets without a tokenizer": lambda: steer.ContrastSet.from_sets(None, ["a"], ["b"]),
    "sets as text": lambda: steer.ContrastSet.from_sets(TOKENIZER, "cat", "dog"),
    "pairs with the model": lambda: steer.ContrastSet.from_pairs(MODEL, PAIRS),
    "encode None": lambda: encode(TOKENIZER, None),
    "encode an answer of numbers": lambda: encode(TOKENIZER, "cat", 5),
    "plain None": lambda: plain(TOKENIZER, None),
    "conversation as text": lambda: encode_chat(TOKENIZER, "hi"),
    "turn without content": lambda: encode_chat(TOKENIZER, [{"role": "user"}]),
    "turn of text": lambda: encode_chat(TOKENIZER, ["hi"]),
    "mask as text": lambda: annotate(steer.response_tokens, "response"),
    "mask NaN": lambda: annotate(steer.response_tokens, torch.full((2, 6), NAN)),
    "roles as text": lambda: annotate(steer.chat_roles, [["user", "user"]]),
    "roles that are not known": lambda: annotate(steer.chat_roles, torch.full((2, 6), 9)),
    "roles below 0": lambda: annotate(steer.chat_roles, torch.full((2, 6), -1)),
    "roles None": lambda: annotate(steer.chat_roles, None),
    "plan text None": lambda: steer.plan_from_text(None, {"warm": WARM}),
    "named directions as list": lambda: steer.plan_from_text("warm", [WARM]),
    "named vector": lambda: steer.plan_from_text("warm", {"warm": V}),
    "named text": lambda: steer.plan_from_text("warm", {"warm": "x"}),
    "named gate as text": lambda: steer.plan_from_text("warm ?h", {"warm": WARM}, {"h": "x"}),
    "direction of text": lambda: steer.Direction("embed", "x", "m", "all"),
    "direction at a number": lambda: steer.Direction(3, V, "m", "all"),
    "directions of numbers": lambda: steer.Directions([3], "t", {}),
    "directions of one": lambda: steer.Directions(WARM, "t", {}),
    "two directions at a site": lambda: steer.Directions([WARM, direction("layers.1.output", seed=1)], "t", {}),
    "load None": lambda: steer.load(None),
    "load a number": lambda: steer.load(3),
    "device that is not there": lambda: steer.load("no/model", device="cuda:77"),
    "device of no kind": lambda: steer.load("no/model", device="gpu"),
    "import None": lambda: steer.import_directions(None),
    "complex vector": lambda: Add(torch.ones(32, dtype=torch.complex64)),
    "sparse vector": lambda: Add(V.to_sparse()),
    "vector on the meta device": lambda: Add(V.to("meta")),
    "half a gate": lambda: steer.ProbeGate(V) & "x",
    "gate of no function": lambda: steer.CallGate(3, 32),
    "center of another width": lambda: steer.FeatureGate(V, center=torch.ones(16)),
    "loreft of no width": lambda: steer.LoReFT.initial("4", rank=1),
    "heads as text": lambda: steer.HeadShift(torch.ones(2, 8), "01", 4),
    "fractions of heads": lambda: steer.HeadShift(torch.ones(2, 8), [0.0, 1.0], 4),
    "k_steering without weights": lambda: steer.KSteering(None, [V], [0]),
    "bake None": lambda: steer.bake(None, MODEL),
    "bake into a name": lambda: steer.bake(Plan(intervention()), "m"),
    "apply a name": lambda: EditedWeights.of(MODEL).apply("capital"),
    "edits of a number": lambda: Edit(3, "memit", ()),
    "factors as lists": lambda: WeightDelta("model.layers.1.mlp.down_proj", 1, [[1.0]], [[1.0]]),
    "adapter of no edit": lambda: to_adapter([None], MODEL, "x"),
    "callback without edits": lambda: EditCallback(None, TOKENIZER),
    "callback of edits without a tokenizer": lambda: EditCallback(Edit((), "none", (), "empty"), None),
    "adapter of None": lambda: steer.to_adapter(None, MODEL, "x"),
    "adapter into a number": lambda: steer.to_adapter(Plan(intervention()), MODEL, 3),
    "control vector of text": lambda: steer.to_gguf("p", "x.gguf"),
    "control vector into None": lambda: steer.to_gguf(Plan(intervention()), None, model_hint="llama"),
    "control vector for a number": lambda: steer.to_gguf(Plan(intervention()), "x.gguf", model_hint=3),
    "control vector of another width": lambda: steer.to_gguf(Plan(intervention(), fingerprint={"width": 64}), "x.gguf", model_hint="llama"),
    "lm-eval file for no model": lambda: steer.to_lm_eval(Plan(intervention()), None, "x.pt"),
    "more than half precision holds": lambda: Plan(intervention(strength=1e6)).attach(FAMILIES["llama"]().half()),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_call_names_it(case):
    with pytest.raises(SteerError) as caught:
        WRONG[case]()
    assert caught.value.remedy and caught.value.found and caught.value.expected


@pytest.mark.parametrize("call", [lambda: dose_curve(WARMS), lambda: screen(WARMS), lambda: select([WARMS])])
def test_directions_where_a_single_direction_is_expected(call):
    with pytest.raises(ConfigError, match=r"directions\.best\(\)"):
        call()


@pytest.mark.parametrize("what", ["the sites", "the row slots of a batch", "the dose"])
def test_messages_read_well_for_one_and_for_many(what):
    for check in (lambda: of_type(None, str, what, "x"), lambda: tensor_of(None, what, "x"), lambda: whole_number(None, what)):
        with pytest.raises(ConfigError) as caught:
            check()
        assert caught.value.what.endswith(f" {what}") and " is " not in caught.value.what


def test_lists_and_sites_as_text_make_a_direction():
    read_from_list = steer.Direction("layers.1.output", [1, 2], "m", "all")
    assert read_from_list.site == steer.Site.parse("layers.1.output") and torch.equal(read_from_list.vector, torch.tensor([1.0, 2.0]))


def test_arrays_and_lists_are_vectors():
    assert torch.equal(Add(np.ones(4)).tensors["vector"], Add([1, 1, 1, 1]).tensors["vector"])
    for make, tensor in (
        (lambda plane: Rotate(plane, 0.5), torch.eye(2, 4)),
        (lambda rows: Erase(rows[0], rows[1], rows[2]), torch.eye(3, 4)),
        (lambda weights: KSteering(weights, [[0.0] * 4], [0]), torch.ones(2, 4, 4)),
    ):
        from_tensor, from_list = make(tensor).tensors, make(tensor.tolist()).tensors
        assert from_tensor.keys() == from_list.keys() and all(torch.equal(from_tensor[name], from_list[name]) for name in from_tensor)


def test_a_soft_cosine_may_be_learned_beyond_what_a_hard_one_reaches():
    assert CosineGate(V, 1.5, sharpness=2.0).is_soft and not CosineGate(V, 1.0).is_soft


def test_one_intervention_in_two_plans_or_twice_in_one():
    shared = intervention(name="warm")
    first, second, twice = Plan(shared), Plan([intervention(name="warm"), shared]), Plan([shared, shared])
    attachments = [attachment_of(plan) for plan in (first, second, twice)]
    attachments[0].set_strength(5.0)
    assert [attachment.interventions[-1].strength.item() for attachment in attachments] == [5.0, 1.0, 1.0]
    assert shared.strength == (1.0,)
    assert shared.name == "warm" and [each.name for each in twice.interventions] == ["warm", "warm#2"]
    model = FAMILIES["llama"]()
    with twice.attached(model) as attachment:
        model(torch.arange(6)[None])
    assert attachment.fired() == {"warm": 6, "warm#2": 6}


def test_plans_have_tensors_of_their_own():
    gated = CallGate(lambda h, ctx: h[..., 0], 32, sharpness=2.0)
    original = intervention(strength=[1.0, 2.0], gate=gated)
    first, second = attachment_of(Plan(original)), attachment_of(Plan(original))
    copied = attachment_of(Plan(first.plan.interventions))
    first.set_rows([0, 1])
    first.interventions[0].operator.tensors["vector"].zero_()
    first.interventions[0].gate.tensors["sharpness"].zero_()
    first.set_rows([1, 0])
    for untouched in (original, second.interventions[0], copied.interventions[0]):
        assert torch.equal(untouched.operator.tensors["vector"][0], V) and float(untouched.gate.tensors["sharpness"]) == 2.0
    assert first.interventions[0].rows.tolist() == [1, 0] and second.interventions[0].rows is copied.interventions[0].rows is None


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
