"""Arms: what a configuration may say, old ones read as the same plans, and controls that match what they are compared with."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.resources import files
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, WIDTH
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.directions import Direction, Directions
from steer.errors import ConfigError
from steer.experiment.arms import DRAWS, Arm, check_size, check_training, read_arms
from steer.experiment.treatment import Bench, Treatment
from steer.experiment.treatments.none import NoTreatment
from steer.experiment.treatments.plan import PlanTreatment
from steer.experiment.treatments.prompt import Prompt
from steer.intervene import Intervention, Plan
from steer.model.site import Site
from steer.model.tokens import plain

SITE = "layers.1.output"
PLAN = {"kind": "plan", "plan": "2 warm@response"}
GOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "preventative": {"treatment": PLAN, "when": "train"},
    "random": {"controls": "preventative", "draws": 3},
    "inference": {"treatment": PLAN, "when": "inference", "uses": "plain"},
}
TRAIT = {"name": "warm", "site": SITE}
# as configurations were written before treatments were registered
OLD: dict[str, dict[str, Any]] = {
    "plain": {"label": "plain fine-tuning"},
    "preventative": {"when": "train", "direction": "trait", "strength": 2.0},
    "random": {"when": "train", "direction": "random", "strength": 2.0},
    "inference": {"when": "inference", "direction": "trait", "strength": -1, "uses": "plain"},
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    tokenizer = tiny_tokenizer()
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(12345))
    entries = [Direction(Site.parse(SITE), vector, "mean_difference", "response", {"auc": 0.9, "dprime": 1.0})]
    rows = [plain(tokenizer, text) for text in ("the cat is good .", "where is the dog ?", "one two three four")]
    return Bench(FAMILIES["llama"](), tokenizer, rows, {"warm": Directions(entries, "warm", {})})


@pytest.mark.parametrize("name", ["tone", "prompt_vs_vector", "strength_sweep"])
def test_the_shipped_experiments_have_a_control_a_prompt_and_something_to_compare_with(name: str) -> None:
    folder = files("steer.conf") / "experiment"
    shipped = yaml.safe_load((folder / f"{name}.yaml").read_text())
    arms = read_arms({**yaml.safe_load((folder / "tone.yaml").read_text())["arms"], **shipped["arms"]})
    assert any(arm.control_of is not None and arm.draws == DRAWS for arm in arms) and any(arm.when == "never" for arm in arms)
    assert any(isinstance(arm.treatment, Prompt) and arm.control_of is None for arm in arms), "prompting often wins"
    for arm in arms:
        if arm.control_of is not None:
            of = next(other for other in arms if other.name == arm.control_of)
            assert (arm.treatment, arm.when, arm.uses) == (of.treatment, of.when, of.uses)


def test_arms_come_in_the_order_of_the_configuration() -> None:
    backwards = dict(reversed(GOOD.items()))
    assert [arm.name for arm in read_arms(backwards)] == list(backwards), "a control may stand before what it controls"
    arms = {arm.name: arm for arm in read_arms(GOOD)}
    assert {name: (arm.when, arm.is_trained, arm.draws) for name, arm in arms.items()} == {
        "plain": ("never", True, 1),
        "preventative": ("train", True, 1),
        "random": ("train", True, 3),
        "inference": ("inference", False, 1),
    }
    assert arms["random"].treatment is arms["preventative"].treatment and arms["random"].control_of == "preventative"


def test_labels_default_to_names_and_null_leaves_an_arm_out() -> None:
    arms = read_arms({**GOOD, "preventative": None, "random": None, "plain": {"label": "as it is"}})
    assert [(arm.name, arm.label) for arm in arms] == [("plain", "as it is"), ("inference", "inference")]


@pytest.mark.parametrize(
    ("when", "acts"),
    [("never", (False, False)), ("train", (True, False)), ("inference", (False, True)), ("both", (True, True)), ("baked", (False, False))],
)
def test_when_it_acts(when: str, acts: tuple[bool, bool]) -> None:
    treatment: Treatment = NoTreatment() if when == "never" else PlanTreatment("warm")
    arm = Arm("a", "a", treatment, when)
    assert (arm.acts_in_training, arm.acts_at_inference) == acts


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ({**GOOD, "b": {"treatment": PLAN, "when": "sometimes"}}, ("'b'", "never, train, inference, both, baked", "sometimes")),
        ({**GOOD, "b": {"treatment": "plam"}}, ("'b'", "plam", "did you mean 'plan'")),
        ({**GOOD, "b": {"treatment": {"plan": "warm"}}}, ("'b'", "unknown treatment 'None'")),
        ({**GOOD, "b": {"treatment": {"kind": "plan", "paln": "warm"}}}, ("'b'", "no option 'paln'", "did you mean 'plan'")),
        ({**GOOD, "b": {"treatment": {"kind": "plan"}}}, ("'b'", "treatment 'plan' cannot be made")),
        ({**GOOD, "b": {"treatment": {"kind": "plan", "plan": 3}}}, ("the plan of a treatment",)),
        ({**GOOD, "b": {"when": "train"}}, ("'b'", "treatment 'none' cannot act with when=train", "when=never")),
        ({**GOOD, "b": {"treatment": {"kind": "prompt", "system": "x"}, "when": "baked"}}, ("'b'", "when=train or inference or both")),
        ({**GOOD, "b": {"treatment": PLAN, "when": "never"}}, ("'b'", "cannot act with when=never")),
        ({**GOOD, "b": {"treatment": PLAN, "when": "train", "uses": "plain"}}, ("'b'", "uses=plain")),
        ({**GOOD, "b": {"treatment": PLAN, "when": "inference", "uses": "inference"}}, ("'b' uses 'inference'", "not trained")),
        ({**GOOD, "b": {"controls": "prevent"}}, ("'b' controls 'prevent'", "did you mean 'preventative'")),
        ({**GOOD, "b": {"controls": "plain"}}, ("'b' controls 'plain'", "nothing is done")),
        ({**GOOD, "b": {"controls": "random"}}, ("'b'", "random")),
        ({**GOOD, "b": {"controls": "preventative", "treatment": PLAN}}, ("'b'", "either controls or treatment")),
        ({**GOOD, "b": {"controls": "preventative", "draws": 0}}, ("'b' needs draws", "found: 0")),
        ({**GOOD, "b": {"controls": "preventative", "draws": True}}, ("'b' needs draws",)),
        ({**GOOD, "b": {"draws": 3}}, ("'b'", "draws only with controls")),
        ({**GOOD, "b": {"strenght": 1.0}}, ("'b'", "strenght")),
        ({**GOOD, "b": 3}, ("'b'", "3")),
        ({}, ("needs an arm",)),
        (None, ("needs an arm",)),
        ({**GOOD, "plain": None}, ("'inference' uses 'plain'", "one of preventative", "experiment.arms.inference=null")),
        ({"a": {"when": "train", "direction": "up"}}, ("'a'", "none, trait, random", "up")),
        ({"a": {"when": "train", "direction": "none"}}, ("'a'", "contradictory")),
        ({"a": {"direction": "trait"}}, ("'a'", "contradictory")),
        ({"a": {"when": "inference", "direction": "trait", "strength": 1}}, ("'a'", "`uses` exactly with when=inference")),
        ({"a": {"when": "train", "direction": "trait", "strength": "strong"}}, ("'a'", "strength", "strong")),
        ({"a": {"when": "train", "direction": "trait", "strength": float("nan")}}, ("'a'", "strength", "nan")),
        ({"a": {"treatment": PLAN, "doses": [1, 1]}}, ("'a' needs doses",)),
        ({"a": {"treatment": PLAN, "doses": []}}, ("'a' needs doses",)),
        ({"a": {"treatment": PLAN, "doses": ["much"]}}, ("'a' needs doses", "much")),
        ({"a": {"treatment": PLAN, "doses": 3}}, ("'a' needs doses",)),
        ({"a": {"treatment": {"kind": "prompt", "system": "x"}, "doses": [1, 2]}}, ("no option 'dose'",)),
        ({"a": {"doses": [1, 2]}}, ("'a' has doses of nothing",)),
        ({"a": {"treatment": PLAN, "doses": [1, 2]}, "a x1": {}}, ("two arms are called 'a x1'",)),
        ({"a x1": {}, "a": {"treatment": PLAN, "doses": [1, 2]}}, ("two arms are called 'a x1'",)),
        ({**GOOD, "b": {"controls": "inference", "when": "baked"}}, ("'b'", "when=inference, as 'inference', whose control it is")),
        ({**GOOD, "b": {"controls": "inference", "uses": "preventative"}}, ("'b'", "uses=plain, as 'inference'")),
        ({**GOOD, "": {}}, ("name of an arm",)),
        ({**GOOD, "two\nlines": {}}, ("name of an arm", "in one line")),
        ({**GOOD, "\N{GREEK SMALL LETTER ALPHA}" * 60: {}}, ("name of an arm", "100 bytes")),
    ],
)
def test_what_is_wrong_is_named(specs: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arms(specs, trait=TRAIT)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert None not in (caught.value.expected, caught.value.remedy)


# ---- configurations of older versions


def test_old_arms_are_the_same_plans(bench: Bench) -> None:
    arms = {arm.name: arm for arm in read_arms(OLD, trait=TRAIT, scope="response")}
    assert {name: (arm.when, arm.uses, arm.control_of, arm.draws) for name, arm in arms.items()} == {
        "plain": ("never", None, None, 1),
        "preventative": ("train", None, None, 1),
        "random": ("train", None, "preventative", 1),
        "inference": ("inference", "plain", None, 1),
    }
    assert arms["plain"].label == "plain fine-tuning"
    trait = bench.directions["warm"][SITE].vector
    for name, strength in (("preventative", 2.0), ("inference", -1.0), ("random", 2.0)):
        (treatment,) = arms[name].treatments(bench)
        assert isinstance(treatment, PlanTreatment)
        (intervention,) = treatment.plan.interventions
        assert (str(intervention.site), str(intervention.scope), list(intervention.strength)) == (SITE, "response", [strength])
        vector = intervention.operator.tensors["vector"][0]
        assert torch.equal(vector, trait) is (name != "random") and float(vector.norm()) == pytest.approx(float(trait.norm()), rel=1e-5)


@pytest.mark.parametrize("change", [{"strength": 0.5}, {"when": "inference", "uses": "plain"}])
def test_an_old_random_arm_that_controls_no_arm_is_refused(change: dict[str, Any]) -> None:
    """Read as the trait itself it would be the very thing that it was to be held against."""
    with pytest.raises(ConfigError, match=r"arm 'random' is the control of no arm[\s\S]*controls"):
        read_arms({**OLD, "random": {**OLD["random"], **change}}, trait=TRAIT, scope="response")


# ---- controls


def test_a_control_has_a_partner_for_each_draw(bench: Bench) -> None:
    arms = {arm.name: arm for arm in read_arms(GOOD, trait=TRAIT)}
    partners = arms["random"].treatments(bench)
    vectors = [partner.plan.interventions[0].operator.tensors["vector"][0] for partner in partners]  # type: ignore[attr-defined]
    assert len(vectors) == 3 and len({tuple(vector.tolist()) for vector in vectors}) == 3
    again = [p.plan.interventions[0].operator.tensors["vector"][0] for p in arms["random"].treatments(bench)]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(vectors, again, strict=True))


class Forged(PlanTreatment):
    """Its partner is larger by some share."""

    by = 1.0

    def control(self, bench: Bench, seed: int) -> Treatment:
        (intervention,) = self.plan.interventions
        turned = intervention.operator.tensors["vector"][0].flip(0)
        return PlanTreatment(Plan(intervention.unchecked(operator=steer.Add(self.by * turned))))


@pytest.mark.parametrize(("by", "fits"), [(1.0, True), (1.015, True), (0.985, True), (1.03, False), (0.97, False), (0.0, False)])
def test_a_control_that_does_not_match_is_refused(bench: Bench, by: float, fits: bool) -> None:
    treatment = Forged(Plan(Intervention(steer.Add(torch.arange(WIDTH) + 1.0), SITE, name="warm")))
    treatment.by = by
    arm = Arm("random", "random", treatment, "inference", control_of="steered", draws=2)
    if fits:
        assert len(arm.treatments(bench)) == 2
    else:
        with pytest.raises(ConfigError, match=r"'random' is no matched control of 'steered': root mean square of \|dh\| of 'warm'"):
            arm.treatments(bench)


@pytest.mark.parametrize("reached", [{}, {"other": 1.0}, {"warm": float("nan")}, {"warm": 1.021}, {"warm": 0.979}])
def test_sizes_that_differ(reached: dict[str, float]) -> None:
    arm = Arm("random", "random", PlanTreatment("warm"), "inference", control_of="steered")
    check_size(arm, arm.treatment, {"warm": 1.0}, {"warm": 1.019})
    with pytest.raises(ConfigError, match="'random' is no matched control of 'steered': root mean square"):
        check_size(arm, arm.treatment, {"warm": 1.0}, reached)


# ---- sweeps


def test_a_sweep_is_an_arm_for_each_dose_and_its_controls_with_it(bench: Bench) -> None:
    specs = {
        "plain": {},
        "against": {"treatment": PLAN, "when": "inference", "doses": [0.5, 1, 2]},
        "random": {"controls": "against", "draws": 2},
    }
    arms = read_arms(specs)
    assert [(arm.name, arm.sweep, arm.dose, arm.control_of) for arm in arms] == [
        ("plain", None, None, None),
        *((f"against x{dose:g}", "against", dose, None) for dose in (0.5, 1, 2)),
        *((f"random x{dose:g}", "random", dose, f"against x{dose:g}") for dose in (0.5, 1, 2)),
    ]
    base = float(bench.directions["warm"][SITE].vector.norm())
    for arm in arms[1:]:
        assert arm.dose is not None
        for treatment in arm.treatments(bench):
            assert list(treatment.size(bench).values()) == pytest.approx([2 * arm.dose * base], rel=1e-3)


def test_doses_that_are_nearly_equal_are_arms_of_their_own() -> None:
    arms = read_arms({"a": {"treatment": PLAN, "doses": [1, 1.0000001, -1, 0]}})
    assert [(arm.name, arm.dose) for arm in arms] == [("a x1", 1), ("a x1.0000001", 1.0000001), ("a x-1", -1), ("a x0", 0)]


@pytest.mark.parametrize(("when", "fits"), [("train", False), ("both", False), ("inference", True), ("baked", True)])
def test_an_arm_that_acts_in_training_needs_one(when: str, fits: bool) -> None:
    arms = read_arms({"plain": {}, "a": {"treatment": PLAN, "when": when}})
    check_training(arms, trains=True)
    with nullcontext() if fits else pytest.raises(ConfigError, match="'a' acts in training, and this experiment trains nothing"):
        check_training(arms, trains=False)
