"""The main job from end to end: on a tiny model, where everything it writes is checked, and once on the real one."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_experiment import SMALL, overrides, write_data, write_model

from steer import Directions, Plan
from steer.cli import main
from steer.commands.generate import completions
from steer.drift import DriftStore
from steer.errors import ConfigError, DamagedFileError, ModelNotFoundError
from steer.experiment import results
from steer.experiment.arms import random_like
from steer.model import embedded

# the only things that may differ between two runs
TIMES = ("started", "wall_seconds", "seconds", "probe_seconds", "callback_overhead", "callback_overhead_range")


@contextmanager
def logging_restored() -> Iterator[None]:
    """Hydra configures the root logger of the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def train(parts: tuple[Path | str, Path], out: Path, *more: str) -> dict[str, Any]:
    with logging_restored():
        assert main(["train", *overrides(*parts, out, *more)]) == 0
    return json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def run(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, train(parts, out, *SMALL)


# ---- what is written


def test_the_output_is_complete_and_agrees_with_itself(run: tuple[Path, dict[str, Any]]) -> None:
    check_output(*run)


def check_output(out: Path, metrics: dict[str, Any]) -> None:
    """Everything that metrics.json names is there and says the same."""
    names = [arm["name"] for arm in metrics["arms"]]
    assert names == ["plain", "preventative", "random", "inference"]
    page = (out / "report.html").read_text()
    assert metrics["specificity"]["statement"] in page and metrics["command"] in page.replace("&#39;", "'")
    assert all(arm["label"] in page for arm in metrics["arms"])
    assert metrics["command"].startswith("steer train ") and f"hydra.run.dir={out}" in metrics["command"]

    artifacts = metrics["artifacts"]
    directions = Directions.load(out / artifacts["directions"])
    chosen = directions[metrics["trait"]["site"]]
    assert chosen.metrics["auc"] == metrics["trait"]["auc_heldout"]
    assert set(artifacts["plans"]) == {"preventative", "random", "inference"}
    vectors = {}
    for name, path in artifacts["plans"].items():
        plan = Plan.load(out / path)
        (intervention,) = plan.interventions
        (arm,) = (arm for arm in metrics["arms"] if arm["name"] == name)
        assert (str(intervention.site), str(intervention.scope), list(intervention.strength)) == (
            arm["steer"]["site"],
            arm["steer"]["scope"],
            [arm["steer"]["strength"]],
        )
        assert plan.fingerprint == metrics["model"]["fingerprint"]
        vectors[name] = intervention.operator.tensors["vector"][0]
    assert torch.equal(vectors["preventative"], chosen.vector) and torch.equal(vectors["inference"], chosen.vector)
    assert torch.equal(vectors["random"], random_like(chosen, metrics["seed"] + 1))

    adapters = {name: load_file(out / path / "adapter_model.safetensors") for name, path in artifacts["adapters"].items()}
    assert list(adapters) == names
    assert all(torch.equal(adapters["plain"][key], adapters["inference"][key]) for key in adapters["plain"])
    for steered in ("preventative", "random"):
        assert any(not torch.equal(adapters["plain"][key], adapters[steered][key]) for key in adapters["plain"]), (
            f"{steered} was not steered"
        )

    trait, sites = metrics["config"]["experiment"]["trait"]["name"], set(metrics["config"]["experiment"]["drift"]["sites"])
    steps = metrics["arms"][0]["train"]["steps"]
    assert set(metrics["drift"]["stores"]) == {"plain", "preventative", "random"}
    for path in metrics["drift"]["stores"].values():
        with DriftStore(out / path) as store:
            records = store.records()
            assert store.fingerprint == metrics["model"]["fingerprint"] and len(store.attempts()) == 1
        probed = [record for record in records if record.mode == "probe"]
        assert {record.site for record in probed} == sites and max(record.step for record in probed) == steps
        assert {record.direction for record in probed if record.kind == "named"} == {trait}
        assert {record.step for record in records if record.mode == "stream"} == {record.step for record in probed} - {0}
        baseline = [record for record in probed if record.step == 0 and record.kind == "named"]
        assert baseline and all(record.change == 0 for record in baseline)

    for arm in metrics["arms"]:
        assert len(arm["train"]["loss"]) == arm["train"]["steps"] == metrics["config"]["experiment"]["train"]["steps"]
        assert [completion["prompt"] for completion in arm["completions"]] == metrics["config"]["experiment"]["completions"]["prompts"]
        for metric in arm["metrics"].values():
            assert math.fsum(metric["per_item"]) / metric["n"] == pytest.approx(metric["after"])
            assert metric["after"] - metric["before"] == pytest.approx(metric["change"], abs=1e-9)
        overhead = arm["train"]["callback_overhead"]
        assert (overhead is None) == (arm["steer"]["when"] != "train") and (overhead is None or -1 < overhead < 20)
        spread = arm["train"]["callback_overhead_range"]
        assert spread is None if overhead is None else spread[0] <= overhead <= spread[1]
    loss = {arm["name"]: arm["train"]["loss"] for arm in metrics["arms"]}
    assert loss["plain"] == loss["inference"] and loss["plain"][0] != loss["preventative"][0], "the first step is steered already"


def test_every_trained_arm_starts_from_the_same_weights_and_sees_the_same_batches(run: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = run
    befores = {(name, metric["before"]) for arm in metrics["arms"] for name, metric in arm["metrics"].items()}
    assert len(befores) == 3, "one baseline per metric"


def test_every_key_of_the_metrics_is_documented_and_every_documented_one_is_there(run: tuple[Path, dict[str, Any]]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.M))
    assert documented == set(keys(run[1]))


def keys(node: Any, name: str = "") -> Iterator[str]:
    """Paths to every value: `arms[].metrics.<metric>.ci`. Names that a run chooses stand as <what they are>."""
    chosen = {"arms[].metrics": "metric", "trait.auc_by_site": "site", "versions": "package", "drift.stores": "arm"}
    chosen |= {"artifacts.adapters": "arm", "artifacts.plans": "arm"}
    if isinstance(node, dict) and name not in ("config", "model.fingerprint"):
        for key, inner in node.items():
            yield from keys(inner, f"{name}.<{chosen[name]}>" if name in chosen else f"{name}.{key}".lstrip("."))
    elif isinstance(node, list) and any(isinstance(inner, dict) for inner in node):
        for inner in node:
            yield from keys(inner, f"{name}[]")
    else:
        yield name


# ---- once more


def without_times(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_times(inner) for key, inner in node.items() if key not in (*TIMES, "command", "json_sha256")}
    return [without_times(inner) for inner in node] if isinstance(node, list) else node


def test_the_same_seed_gives_the_same_numbers_and_another_seed_does_not(
    parts: tuple[Path, Path], run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first, metrics = run
    torch.manual_seed(99)  # the state of the process must not matter
    again = train(parts, tmp_path / "again", *SMALL)
    assert without_times(again) == without_times(metrics)
    records = [results.drift_records(folder, run_metrics) for folder, run_metrics in ((first, metrics), (tmp_path / "again", again))]
    assert repr(records[0]) == repr(records[1])  # repr, because nan differs from itself
    fewer_arms = train(parts, tmp_path / "other", *SMALL, "seed=1", "experiment.arms.random=null", "experiment.arms.inference=null")
    assert [arm["name"] for arm in fewer_arms["arms"]] == ["plain", "preventative"]
    assert fewer_arms["arms"][0]["train"]["loss"] != metrics["arms"][0]["train"]["loss"]
    assert fewer_arms["specificity"]["specific"] is None


# ---- steer generate


def test_generate_says_what_the_run_said(run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, metrics = run
    before = sorted(out.rglob("*"))
    said = completions(out, None, None, 4)
    expected = {arm["name"]: [completion["text"] for completion in arm["completions"]] for arm in metrics["arms"]}
    assert said == {"base": [completion["text"] for completion in metrics["base_completions"]], **expected}
    with logging_restored():
        assert main(["generate", f"run={out}", "prompts=who are you", "arms=inference", "max_new_tokens=3"]) == 0
    shown = capsys.readouterr().out
    assert "who are you" in shown and "inference" in shown and "base" in shown and "preventative" not in shown
    assert sorted(out.rglob("*")) == before, "it writes nothing"


def test_generate_names_what_is_missing(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, metrics = run
    with pytest.raises(ConfigError, match="no arm is called prevent"):
        completions(out, None, ["prevent"], 3)
    (tmp_path / "metrics.json").write_text(results.to_json(metrics))
    with pytest.raises(DamagedFileError, match="lacks the adapter of 'plain'"):
        completions(tmp_path, None, None, 3)


# ---- the real model


@pytest.mark.real
def test_the_real_model_is_trained_steered_tracked_and_reported(tmp_path: Path) -> None:
    try:
        embedded.converted_folder()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    small = [
        "experiment.trait.sites=[layers.12.output,layers.20.output]",
        "experiment.trait.site=layers.12.output",
        "experiment.drift.sites=[layers.12.output,layers.20.output]",
        "experiment.train.steps=2",
        "peft.layers=[28,29]",  # the backward pass ends there
    ]
    data = write_data(tmp_path / "data")
    metrics = train((embedded.NAME, data), tmp_path / "run", *small)
    check_output(tmp_path / "run", metrics)
    assert metrics["model"]["name"] == embedded.NAME and metrics["model"]["fingerprint"]["n_layers"] == 30
    said = completions(tmp_path / "run", ["What is the capital of France?"], ["plain", "inference"], 8)
    assert list(said) == ["base", "plain", "inference"] and "Paris" in said["base"][0]
