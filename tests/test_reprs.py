"""What is printed of the public objects: one line that says what it is, without the numbers of a tensor."""

from __future__ import annotations

import pytest
import torch
from edits.edit_helpers import random_edit
from hand import attachment_of, vector
from method_tables import own_names
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.callbacks import DriftCallback, EditCallback, SteeringCallback
from steer.callbacks.hf_steering import HFSteeringCallback
from steer.circuits import Pairs
from steer.directions.dose import DoseCurve, DosePoint
from steer.directions.erasure import Erasure
from steer.directions.screening import Screen
from steer.directions.selection import Candidate, Selection
from steer.drift.records import DriftRecord
from steer.edits import EditedWeights
from steer.experiment.contrasts import contrast
from steer.experiment.stats import Interval
from steer.features.refined import Refined
from steer.intervene import OPERATORS, Ablate, Add, CallGate, CosineGate, Intervention, Linear, Plan, ProbeGate
from steer.intervene.deploy.baked import Baked
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.site import Site
from steer.model.tokens import Row

DIRECTION = steer.Direction(Site.parse("layers.1.output"), 2 * torch.eye(32)[0], "mean_difference", "response", {"auc": 0.987654})
DIRECTIONS = steer.Directions([DIRECTION, steer.Direction(Site("output", 2), vector(), "lda", -1)], "warm", {})
ROWS = (Row((1, 2, 3), 1), Row((1, 2, 4), 1))
PLAN = Plan(
    [
        Intervention(Add(vector()), "layers.1.output", "response", 0.4, schedule=Linear(10), gate=ProbeGate(vector()), name="warm"),
        Intervention(Ablate(vector()), "layers.*.output", name="ablate", enabled=False, preserve_norm=True),
    ]
)
CURVE = DoseCurve("layers.1.output", "lda", "response", (DosePoint(0.1, 1.0, 0.5, 0.01, 0.0, 0.01, 1.01),), 0.1, 1.1, 0.5, 0.0, 9.0, 4, 4)
CANDIDATES = tuple(Candidate(f"layers.{n}.output", "response", "lda", float(n), 0.0, 0.0, "late" * n) for n in (0, 1))

SHOWN = {
    "Site('layers.-1.attn.z')": Site.parse("layers.-1.attn.z"),
    "Sites('layers.*.output,embed')": Intervention(Add(vector()), ["layers.*.output", "embed"]).site,
    "Scope('prompt[-4:]|last~32')": steer.Scope.parse("prompt[-4:]|last~32"),
    "Linear(steps=10, start=0.0, end=1.0)": Linear(10),
    "Add(vector [1, 32])": Add(vector()),
    "Add(vector [2, 32], learned: vector)": Add(torch.stack([vector(), vector()])).train(),
    "And(ProbeGate(vector [1, 32], bias [1]), Not(CosineGate(vector [1, 32], threshold [1])))": ProbeGate(vector())
    & ~CosineGate(vector(), threshold=0.1),
    "Intervention('warm': add at layers.1.output on response tokens, strength 0.4, schedule Linear(steps=10, start=0.0, end=1.0), "
    "gate probe per token)": PLAN["warm"],
    "Intervention('ablate': ablate at layers.*.output on all tokens, strength 1, norm preserved, switched off)": PLAN["ablate"],
    "Plan('warm': add at layers.1.output on response tokens, strength 0.4, schedule Linear(steps=10, start=0.0, end=1.0), "
    "gate probe per token; 'ablate': ablate at layers.*.output on all tokens, strength 1, norm preserved, switched off)": PLAN,
    "Plan(5 interventions: 'a': add at embed on all tokens, strength 1; 'a#2': add at embed on all tokens, strength 1; "
    "'a#3': add at embed on all tokens, strength 1; ...)": Plan([Intervention(Add(vector()), "embed", name="a")] * 5),
    "Direction(mean_difference of response at layers.1.output, width 32, length 2, auc 0.988)": DIRECTION,
    "Directions('warm' at 2 sites, layers.1.output to layers.2.output)": DIRECTIONS,
    "Row(3 tokens, 1 of them the prompt)": ROWS[0],
    "ContrastSet(1 pairs)": steer.ContrastSet(ROWS[:1], ROWS[1:], paired=True),
    "ContrastSet(1 positive and 1 negative texts)": steer.ContrastSet(ROWS[:1], ROWS[1:], paired=False),
    "DoseCurve(lda at layers.1.output on response tokens, 1 doses, working: 0.1)": CURVE,
    "Screen(lda at layers.1.output, 2 pairs, steerability 0.5 nat/token, 25% the other way (10% to 40%))": Screen(
        "layers.1.output", "lda", (0.1,), (0.5, 0.5), 0.5, 0.25, (0.1, 0.4)
    ),
    f"Selection(2 candidates, 1 rejected, chosen: {DIRECTION!r})": Selection(CANDIDATES, (DIRECTION, DIRECTION), 0.0, 0.0),
    "Erasure(rank 1, width 32)": Erasure(vector()[None], vector()[None], vector()),
    f"Refined({DIRECTION!r}, 3 features)": Refined(DIRECTION, torch.arange(3), torch.ones(3)),
    "Baked(0 parameters, error 0)": Baked(),
    "ForwardContext(2 x 7 tokens, validate, policy)": ForwardContext(2, 7, "validate", attention=torch.ones(2, 7, dtype=torch.bool)),
    (
        "DriftTracker(rude at 2 sites, Probe(2 prompts, p >= 0.5, span prompt_last, without a baseline) and stream, not attached)"
    ): steer.DriftTracker({"rude": DIRECTIONS}, probe=ROWS),
}


@pytest.mark.parametrize("expected", SHOWN)
def test_it_says_what_it_is(expected):
    assert repr(SHOWN[expected]) == expected


def test_what_lives_on_a_model_says_how_it_is_now(tiny):
    assert repr(Anatomy.find(tiny("llama"))) == "Anatomy(LlamaForCausalLM: 3 blocks of width 32 in 'model')"
    attachment = attachment_of(Plan(Intervention(Add(vector()), "layers.*.output", name="a")))
    attachment.set_strength(0.5)
    attachment.step(3)
    assert repr(attachment) == "Attachment(attached, step 3; 'a': add at layers.*.output on all tokens, strength 0.5)"
    assert repr(attachment["a"]) == "ActiveIntervention('a@layers.0.output' at layers.0.output, strength 0.5, on)"
    attachment.detach()
    assert repr(attachment).startswith("Attachment(not attached, step 3;")


@pytest.mark.parametrize("name", sorted(own_names(OPERATORS)))
def test_every_operator_shows_the_shapes_of_its_tensors(name):
    kind = OPERATORS.get(name)
    shown = kind.__new__(kind)
    shown.tensors = {"vector": torch.zeros(1, 4)}
    assert repr(shown) == f"{kind.__name__}(vector [1, 4])"


def test_the_rest_is_one_line_too():
    callbacks = [SteeringCallback(PLAN), HFSteeringCallback(PLAN), DriftCallback(steer.DriftTracker({"rude": DIRECTION}))]
    results = [
        DriftRecord(10, "probe", "rude", "layers.3.output", "named", 20, {"effect_sd": 1.5}),
        Interval(0.1, 0.0, 0.2, 8),
        contrast("behaviour_gap", "a", "b", [[0.1, 0.2], [0.3, 0.1]], [[0.0, 0.1], [0.1, 0.0]], unit="nat/token"),
        CallGate(lambda h, ctx: h[..., 0], 32),
    ]
    for shown in map(repr, [*callbacks, *results]):
        assert_readable(shown)


def test_an_edit_and_its_life_on_a_model_are_one_line(tiny):
    model = tiny("llama")
    edit = random_edit(model)
    assert repr(edit) == "Edit('a': 1 facts by random, rank 2 in layers 1)" and repr(EditedWeights.of(model)) == "EditedWeights(no edits)"
    with edit.applied(model) as edited:
        assert repr(edited) == "EditedWeights('a')"
    assert repr(EditCallback(edit, tiny_tokenizer(), at_step=3)) == "EditCallback(EditRun(a at step 3, into base, protect=alarm))"
    for shown in map(repr, (edit, edit.deltas[0])):
        assert_readable(shown)


def test_pairs_say_how_many_they_are(tiny):
    rows = [Row((5, 9, 7), 0), Row((5, 9, 7, 4), 0)]
    others = [Row((6, 9, 7), 0), Row((6, 9, 7, 4), 0)]
    assert repr(Pairs.of(tiny("llama"), rows, others)) == "Pairs(2 of 3 to 4 tokens)"


def test_an_operator_that_was_not_initialised_can_be_shown():
    assert repr(Add.__new__(Add)) == "Add()"


def assert_readable(shown: str) -> None:
    assert "\n" not in shown
    assert "tensor(" not in shown
    assert " object at 0x" not in shown
    assert len(shown) < 600
