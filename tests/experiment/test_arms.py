"""Arms: what the configuration may say, the plans they make, and the random direction they are held against."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import torch
import yaml

from steer.directions import Direction
from steer.errors import ConfigError
from steer.experiment.arms import Arm, random_like, read_arms
from steer.model.site import Site

SITE = Site.parse("layers.12.output")
GOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "preventative": {"when": "train", "direction": "trait", "strength": 2.0},
    "inference": {"when": "inference", "direction": "trait", "strength": -1, "uses": "plain"},
}


def direction(width: int = 576, length: float = 3.0) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(12345))
    return Direction(SITE, length * vector / vector.norm(), "mean_difference", "response")


def test_the_shipped_experiment_has_the_four_arms() -> None:
    shipped = yaml.safe_load((files("steer.conf") / "experiment" / "tone.yaml").read_text())
    arms = read_arms(shipped["arms"])
    kinds = {(arm.when, arm.direction) for arm in arms}
    assert kinds == {("never", "none"), ("train", "trait"), ("train", "random"), ("inference", "trait")}
    trained = {(arm.direction): abs(arm.strength) for arm in arms if arm.when == "train"}
    assert trained["trait"] == trained["random"], "the random arm must be as strong as the one it is the control of"


def test_labels_default_to_names_and_null_leaves_an_arm_out() -> None:
    arms = read_arms({**GOOD, "preventative": None})
    assert [(arm.name, arm.label) for arm in arms] == [("plain", "plain"), ("inference", "inference")]


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ({**GOOD, "b": {"when": "sometimes"}}, ("'b'", "never, train, inference", "sometimes")),
        ({**GOOD, "b": {"when": "train", "direction": "up"}}, ("'b'", "none, trait, random", "up")),
        ({**GOOD, "b": {"when": "train"}}, ("'b'", "contradictory", "when=train, direction=none")),
        ({**GOOD, "b": {"direction": "trait"}}, ("'b'", "contradictory", "when=never, direction=trait")),
        ({**GOOD, "b": {"when": "inference", "direction": "trait"}}, ("'b'", "uses=None")),
        ({**GOOD, "b": {"when": "train", "direction": "trait", "uses": "plain"}}, ("'b'", "uses=plain")),
        ({**GOOD, "b": {"when": "train", "direction": "trait", "strength": "strong"}}, ("'b'", "strength", "strong")),
        ({**GOOD, "b": {"when": "train", "direction": "trait", "strength": float("nan")}}, ("'b'", "strength", "nan")),
        ({**GOOD, "b": {"strenght": 1.0}}, ("'b'", "strenght", "strength")),
        ({**GOOD, "b": 3}, ("'b'", "3")),
        ({"inference": GOOD["inference"]}, ("trained arm", "inference")),
        ({}, ("trained arm",)),
        (None, ("trained arm",)),
        ({**GOOD, "plain": None}, ("'inference' uses 'plain'", "one of preventative", "experiment.arms.inference=null")),
    ],
)
def test_what_is_wrong_is_named(specs: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arms(specs)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


def test_plans() -> None:
    trait, fingerprint = direction(), {"model_type": "llama"}
    options: dict[str, Any] = {"scope": "response", "seed": 5, "fingerprint": fingerprint}
    assert Arm("plain", "plain").plan(trait, **options) is None
    during = Arm("a", "a", "train", "trait", 1.5).plan(trait, **options)
    random = Arm("r", "r", "train", "random", 1.5).plan(trait, **options)
    later = Arm("i", "i", "inference", "trait", -2.0, uses="plain").plan(trait, **options)
    assert during is not None and random is not None and later is not None
    (of_during,), (of_random,), (of_later,) = (plan.interventions for plan in (during, random, later))
    assert (of_during.name, of_during.site, str(of_during.scope), of_during.phases) == ("a", SITE, "response", ("train",))
    assert list(of_during.strength) == [1.5] and during.fingerprint == fingerprint
    assert of_later.phases == ("validate", "generate") and list(of_later.strength) == [-2.0]
    assert torch.equal(of_during.operator.tensors["vector"][0], trait.vector)
    assert torch.equal(of_random.operator.tensors["vector"][0], random_like(trait, 5))


@pytest.mark.parametrize("length", [1e-3, 3.0, 1e3])
def test_a_random_direction_has_the_length_of_the_trait_and_nothing_else_of_it(length: float) -> None:
    trait = direction(length=length)
    drawn = [random_like(trait, seed) for seed in range(20)]
    for vector in drawn:
        assert float(vector.norm()) == pytest.approx(length, rel=1e-5)
        # cos of independent directions has a standard deviation of 1 / sqrt(576) = 0.042
        assert abs(float(vector @ trait.unit)) / length < 0.2
    assert torch.equal(drawn[3], random_like(trait, 3)) and not torch.equal(drawn[3], drawn[4])
