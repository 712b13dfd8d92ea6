"""Metric names, by the rules of the loggers, restated here."""

from __future__ import annotations

import posixpath
import re

import pytest
import torch
from callback_helpers import make_plan, make_tracker
from drift.drift_helpers import direction, prompts
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from steer.drift import DriftTracker
from steer.drift.metric_names import check_metric_names, metric_name
from steer.errors import ConfigError
from steer.intervene import Add, Intervention, Plan
from steer.training.drift_run import DriftRun
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


def mlflow_takes(name: str) -> bool:
    """What `mlflow.log_metric` asks of a name: these characters, a normal relative path, and no more than 250 of them."""
    normal = posixpath.normpath(name)
    is_path = normal == name and normal != "." and not normal.startswith(("..", "/"))
    return bool(re.fullmatch(r"[/\w.\- :]*", name)) and is_path and len(name) <= 250


def lightnings_mlflow(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)


def tensorboard(name: str) -> str:
    return re.sub(r"[^-/\w\.]", "_", name, flags=re.ASCII).lstrip("/")


def all_take(name: str) -> bool:
    return mlflow_takes(name) and lightnings_mlflow(name) == name == tensorboard(name)


@given(
    st.lists(st.text(max_size=300) | st.sampled_from(["", ".", "..", "/", "a//b", "add@layers.3.output", "@", "é"]), min_size=1, max_size=4)
)
def test_any_text_becomes_a_name_that_every_logger_takes_as_it_is(parts: list[str]) -> None:
    name = metric_name(*parts)
    assert all_take(name) and all_take(f"train/{name}") and all_take(f"eval_{name}")
    assert metric_name(name) == name


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("steer", "add@layers.3.output", "strength"), "steer/add/layers.3.output/strength"),
        (("drift", "rude", "layers.3.mlp.output", "effect_sd"), "drift/rude/layers.3.mlp.output/effect_sd"),
        (("drift", "very rude!", "module:vision.norm:output", "p"), "drift/very_rude_/module.vision.norm.output/p"),
        (("drift", "a/../b", "embed", "p"), "drift/a/__/b/embed/p"),
        (("drift", "", "embed", "p"), "drift/_/embed/p"),
    ],
)
def test_names(parts: tuple[str, ...], name: str) -> None:
    assert metric_name(*parts) == name


def test_long_names_that_differ_stay_different() -> None:
    long = "x" * 300
    names = {metric_name("drift", f"{long}{i}{long}", "embed", metric) for i in range(3) for metric in ("p", "change")}
    assert len(names) == 6 and all(map(all_take, names)) and all(name.endswith(("embed/p", "embed/change")) for name in names)


def test_names_that_would_be_one_metric_are_refused_at_the_start() -> None:
    check_metric_names(["a@b", "a@c", "a@b"], "interventions")
    with pytest.raises(ConfigError, match=r"two tracked directions would be logged under one name[\s\S]*'so rude@[\s\S]*'so_rude@"):
        DriftTracker({"so rude": direction("layers.1.output"), "so_rude": direction("layers.1.output")}, probe=prompts(4))
    add = Add(torch.ones(32))
    plan = Plan([Intervention(add, "layers.1.output", name="a!"), Intervention(add, "layers.1.output", name="a?")])
    with pytest.raises(ConfigError, match=r"two interventions would be logged under one name[\s\S]*'a!' and 'a\?'"):
        SteeringRun(plan, phases=("train",))


def test_what_runs_log() -> None:
    model = FAMILIES["llama"]()
    steering = SteeringRun(make_plan(), phases=("train",))
    steering.attach(model, Ranks())
    drift = DriftRun(make_tracker(stream=False), 1)
    drift.attach(model, Ranks())
    drift.start(0)
    names = [*steering.metrics(), *drift.values]
    assert all(map(all_take, names))
    assert "steer/add/layers.1.output/strength" in names and "drift/trait/layers.1.output/effect_sd" in names
    drift.detach()
    steering.detach()


def test_a_state_with_the_names_of_an_older_version() -> None:
    first, second = DriftRun(make_tracker(stream=False), 1), DriftRun(make_tracker(stream=False), 1)
    first.attach(FAMILIES["llama"](), Ranks())
    first.start(0)
    first.detach()
    old = {key.replace("trait/layers.1.output", "trait@layers.1.output"): tensor for key, tensor in first.state_dict().items()}
    assert old.keys() != first.state_dict().keys()
    second.load_state_dict(old, is_first_rank=True)
    assert second.values == first.values
