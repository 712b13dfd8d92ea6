"""`steer train` from end to end: on a tiny model, where everything it writes is checked, and once on the real one."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, read_metrics, without_times
from metrics_keys import documented, keys
from safetensors.torch import load_file
from tiny_experiment import SMALL, overrides, write_data, write_model

from steer import Plan
from steer.commands import cell_run
from steer.commands.generate import completions
from steer.drift import DriftStore
from steer.errors import ConfigError, DamagedFileError, ModelNotFoundError
from steer.experiment.overhead import step_overhead
from steer.experiment.result import Result, drift_records
from steer.model import embedded

ARMS = ["plain", "preventative", "random", "inference", "prompt"]
TRAINED = ["plain", "preventative", "random"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def train(parts: tuple[Path | str, Path], out: Path, *more: str) -> dict[str, Any]:
    assert command("train", *overrides(*parts, out, *more)) == 0
    return read_metrics(out)


@pytest.fixture(scope="module")
def run(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, train(parts, out, *SMALL)


# ---- what is written


def test_the_output_is_complete_and_agrees_with_itself(run: tuple[Path, dict[str, Any]]) -> None:
    check_output(*run)


def cell_of(metrics: dict[str, Any], arm: str) -> str:
    (name,) = (name for name, cell in metrics["cells"].items() if cell["arm"] == arm)
    return name


def check_output(out: Path, metrics: dict[str, Any]) -> None:
    """Everything that metrics.json names is there and says the same."""
    assert [arm["name"] for arm in metrics["arms"]] == ARMS
    page = (out / "report.html").read_text()
    assert all(arm["label"] in page for arm in metrics["arms"])
    assert metrics["command"].startswith("steer train ") and f"hydra.run.dir={out}" in metrics["command"]
    assert {(cell["draw"], cell["seed"]) for cell in metrics["cells"].values()} == {(0, 0)}
    assert sorted(folder.name for folder in (out / "cells").iterdir() if folder.is_dir()) == sorted(metrics["cells"])

    plans = {name: Plan.load(out / "cells" / cell_of(metrics, name) / "plan") for name in ("preventative", "random", "inference")}
    site = metrics["config"]["experiment"]["trait"]["site"]
    vectors = {}
    for name, plan in plans.items():
        (intervention,) = plan.interventions
        assert (str(intervention.site), str(intervention.scope)) == (site, "response")
        assert list(intervention.strength) == [-2.0 if name == "inference" else 2.0]
        vectors[name] = intervention.operator.tensors["vector"][0]
    assert torch.equal(vectors["preventative"], vectors["inference"]) and not torch.equal(vectors["preventative"], vectors["random"])
    sizes = {arm["name"]: arm["matched_in"]["draws"] for arm in metrics["arms"]}
    ((length,),) = (size.values() for size in sizes["preventative"])
    ((of_random,),) = (size.values() for size in sizes["random"])
    assert of_random == pytest.approx(length, rel=0.02) and length == pytest.approx(2 * float(vectors["preventative"].norm()), rel=1e-3)

    assert set(metrics["artifacts"]["adapters"]) == {cell_of(metrics, arm) for arm in TRAINED}
    adapters = {
        arm: load_file(out / metrics["artifacts"]["adapters"][cell_of(metrics, arm)] / "adapter_model.safetensors") for arm in TRAINED
    }
    for steered in ("preventative", "random"):
        assert any(not torch.equal(adapters["plain"][key], adapters[steered][key]) for key in adapters["plain"]), (
            f"{steered} was not steered"
        )

    trait, sites = metrics["config"]["experiment"]["trait"]["name"], set(metrics["config"]["experiment"]["drift"]["sites"])
    steps = metrics["config"]["experiment"]["train"]["steps"]
    assert set(metrics["drift"]["stores"]) == {cell_of(metrics, arm) for arm in TRAINED}
    for path in metrics["drift"]["stores"].values():
        with DriftStore(out / path) as store:
            records = store.records()
            assert len(store.attempts()) == 1
        probed = [record for record in records if record.mode == "probe"]
        assert {record.site for record in probed} == sites and max(record.step for record in probed) == steps
        assert {record.direction for record in probed if record.kind == "named"} == {trait}
        assert {record.step for record in records if record.mode == "stream"} == {record.step for record in probed} - {0}
        baseline = [record for record in probed if record.step == 0 and record.kind == "named"]
        assert baseline and all(record.change == 0 for record in baseline)

    prompts = metrics["config"]["experiment"]["completions"]["prompts"]
    assert set(metrics["completions"]) == {"base", *ARMS}
    assert all([answer["prompt"] for answer in answers] == prompts for answers in metrics["completions"].values())
    losses = {cell["arm"]: cell["loss"] for cell in metrics["training"].values()}
    assert set(losses) == set(TRAINED) and all(len(loss) == steps for loss in losses.values())
    assert losses["plain"][0] != losses["preventative"][0], "the first step is steered already"
    assert set(metrics["overhead"]) == {"preventative"}
    for cost in metrics["overhead"].values():
        assert -1 < cost["range"][0] <= cost["median"] <= cost["range"][1] < 20
    check_numbers(out, metrics)


def check_numbers(out: Path, metrics: dict[str, Any]) -> None:
    """Means, differences and changes are those of the values of each item, which the table of scores holds."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for name, cell in metrics["cells"].items():
        done = json.loads((out / "cells" / name / "done.json").read_text())
        assert done["key"] == cell["key"] and done["result"]["timing"]["seconds"] > 0
        for outcome, scores in done["result"]["scores"].items():
            values[cell["arm"], outcome] = scores
    table = out / metrics["scores"]
    assert table.is_file() and table.name in ("scores.parquet", "scores.csv")

    def mean(of: dict[str, float]) -> float:
        return math.fsum(of.values()) / len(of)

    for arm in metrics["arms"]:
        for outcome, found in arm["outcomes"].items():
            assert found["mean"] == pytest.approx(mean(values[arm["name"], outcome]), abs=1e-12)
            assert found["before"] == pytest.approx(mean(values["base", outcome]), abs=1e-12)
            assert found["change"] == pytest.approx(found["mean"] - found["before"], abs=1e-12)
    contrasts = {(contrast["metric"], contrast["a"], contrast["b"]): contrast for contrast in metrics["contrasts"]}
    assert len(contrasts) == len(metrics["contrasts"])
    assert metrics["contrasts"][0]["role"] == "primary" and ("behaviour_gap", "preventative", "random") in contrasts
    for (outcome, a, b), contrast in contrasts.items():
        assert contrast["difference"] == pytest.approx(mean(values[a, outcome]) - mean(values[b, outcome]), abs=1e-12)
        assert contrast["p_adjusted"] >= contrast["p"] and (contrast["n"], contrast["seeds"]) == (4, 1)
        inside = None in contrast["ci"] or contrast["ci"][0] <= 0 <= contrast["ci"][1]
        assert contrast["shown"] is not inside, "an interval without zero goes with a difference that is shown, and no other"
    assert len(metrics["verdict"].split()) <= 20


def test_every_key_of_the_metrics_is_documented_and_every_documented_one_is_there(run: tuple[Path, dict[str, Any]]) -> None:
    assert run[1]["sweep"] == [], "an experiment without one"
    explained = {key for key in documented() if not key.startswith(("sweep[]", "features.", "circuits.", "trade_off_others"))}
    assert explained == set(keys(run[1])) - {"sweep", "features", "circuits", "trade_off_others"}


# ---- once more


def test_the_same_seed_gives_the_same_numbers_and_another_seed_does_not(
    parts: tuple[Path, Path], run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, metrics = run
    monkeypatch.setattr(Result, "report", lambda result, path: path)  # nobody reads these pages
    torch.manual_seed(99)  # the state of the process must not matter
    again = train(parts, tmp_path / "again", *SMALL)
    assert without_times(again) == without_times(metrics)
    records = [drift_records(folder, run_metrics) for folder, run_metrics in ((first, metrics), (tmp_path / "again", again))]
    assert records[0] and repr(records[0]) == repr(records[1])  # repr, because nan differs from itself
    left_out = [f"experiment.arms.{arm}=null" for arm in ("random", "inference", "prompt")]
    fewer = train(parts, tmp_path / "other", *SMALL, "seed=1", "experiment.primary=null", *left_out)
    assert [arm["name"] for arm in fewer["arms"]] == ["plain", "preventative"]
    assert fewer["specificity"] is None and (fewer["contrasts"][0]["a"], fewer["contrasts"][0]["b"]) == ("preventative", "plain")
    losses = [next(cell["loss"] for cell in of["training"].values() if cell["arm"] == "plain") for of in (metrics, fewer)]
    assert losses[0] != losses[1]


# ---- steer generate


def test_generate_says_what_the_run_said(run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, metrics = run
    before = sorted(out.rglob("*"))
    said = completions(out, None, None, 4)
    assert said == {name: [answer["text"] for answer in answers] for name, answers in metrics["completions"].items()}
    assert len({json.dumps(texts) for texts in said.values()}) > 1, "some arm says something else"
    assert command("generate", f"run={out}", "prompts=who are you", "arms=inference", "max_new_tokens=3") == 0
    shown = capsys.readouterr().out
    assert "who are you" in shown and "inference" in shown and "base" in shown and "preventative" not in shown
    assert sorted(out.rglob("*")) == before, "it writes nothing"


def test_generate_names_what_is_missing(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = run
    with pytest.raises(ConfigError, match="no arm is called prevent"):
        completions(out, None, ["prevent"], 3)
    shutil.copy(out / "metrics.json", tmp_path)
    with pytest.raises(DamagedFileError, match=r"cell 'plain\.seed0\.\w+' lacks its adapter"):
        completions(tmp_path, None, None, 3)


# ---- the real model


@pytest.mark.real
def test_the_real_model_is_trained_steered_tracked_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        embedded.converted_folder()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cell_run, "step_overhead", partial(step_overhead, rounds=1))  # of five; the tiny model's are all there
    small = [
        *SMALL,
        "experiment.trait.sites=[layers.12.output,layers.20.output]",
        "experiment.trait.site=layers.12.output",
        "experiment.drift.sites=[layers.12.output,layers.20.output]",
        "experiment.train.steps=2",
        "peft.layers=[28,29]",  # the backward pass ends there
    ]
    data = write_data(tmp_path / "data")
    metrics = train((embedded.NAME, data), tmp_path / "run", *small)
    check_output(tmp_path / "run", metrics)
    assert metrics["model"]["name"] == embedded.NAME
    said = completions(tmp_path / "run", ["What is the capital of France?"], ["plain", "inference"], 8)
    assert list(said) == ["base", "plain", "inference"] and "Paris" in said["base"][0]
