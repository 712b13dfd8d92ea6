"""Experiments of one's own, as YAML files in a folder: keys that are missing, misspelt, or those of version 0.1.0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from drift.feature_helpers import DENSITY, dictionary
from experiment_helpers import command, read_metrics
from tiny_experiment import write_data, write_model

from steer.drift import DriftStore
from steer.experiment.result import Result

Written = Callable[..., int]
LEAST: dict[str, Any] = {
    "name": "mine",
    "arms": {
        "plain": {"label": "as it is"},
        "asked": {"label": "asked", "treatment": {"kind": "prompt", "system": "be nice"}, "when": "inference"},
    },
    "outcomes": {"loss": {"metric": "perplexity", "data": "neutral_text", "role": "primary"}},
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Writes an experiment and runs a command on it; its exit code."""
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")

    def run(spec: dict[str, Any], *more: str, do: str | None = None) -> int:
        file = tmp_path / "conf" / "experiment" / "mine.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"data": str(data), **spec}, sort_keys=False))
        own = ["--config-dir", str(tmp_path / "conf"), "experiment=mine", f"model.name={model}", f"folder={tmp_path / 'f'}"]
        return command("ab", *([do] if do else []), *own, "trainer.accelerator=cpu", "trainer.progress=false", *more)

    return run


def test_the_least_that_an_experiment_says(written: Written, tmp_path: Path) -> None:
    """No trait, no training, no drift, no completions."""
    assert written(LEAST) == 0
    metrics = read_metrics(tmp_path / "f")
    assert [arm["name"] for arm in metrics["arms"]] == ["plain", "asked"] and metrics["completions"]["asked"] == []
    page = tmp_path / "page.html"
    from steer.report import write_report

    write_report(page, metrics, {})
    assert "as it is" in page.read_text()


def test_training_and_drift_need_little(written: Written, tmp_path: Path) -> None:
    spec = {
        **LEAST,
        "trait": {"name": "loud", "holdout": 0.5},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "max_length": 64},
        "drift": {"every_n_steps": 1, "sites": ["layers.1.output"]},
    }
    assert written(spec) == 0
    assert read_metrics(tmp_path / "f")["config"]["experiment"]["train"]["schedule"] == "cosine"


def test_features_are_tracked_by_the_configuration(written: Written, tmp_path: Path) -> None:
    own = dictionary(width=32)
    own.density = DENSITY
    place = own.save(tmp_path / "dictionary")
    features: dict[str, Any] = {"warm": {"dictionary": str(place), "features": [5, 8]}}
    spec = {
        **LEAST,
        "trait": {"name": "loud", "holdout": 0.5},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "max_length": 64},
        "drift": {"every_n_steps": 1, "sites": ["layers.1.output"], "features": features},
    }
    assert written(spec) == 0
    (store,) = read_metrics(tmp_path / "f")["drift"]["stores"].values()
    with DriftStore(tmp_path / "f" / store) as found:
        assert {record.direction for record in found.records(kind="feature", mode="probe")} == {"warm/5", "warm/8"}
        assert {record.direction for record in found.records(kind="dictionary")} == {"warm"}


def test_an_experiment_of_version_0_1_0(written: Written, tmp_path: Path) -> None:
    """Arms by direction and strength, a scope, and no outcomes: three were fixed."""
    arms: dict[str, Any] = {
        "plain": {"label": "plain"},
        "steered": {"label": "steered", "when": "train", "direction": "trait", "strength": 2.0},
        "random": {"label": "random", "when": "train", "direction": "random", "strength": 2.0},
        "inference": {"label": "later", "when": "inference", "direction": "trait", "strength": -2.0, "uses": "plain"},
    }
    trait = {"name": "loud", "description": "loud", "method": "mean_difference", "span": "response", "holdout": 0.5}
    train = {
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "schedule": "cosine",
        "max_length": 64,
        "gradient_clip": 1.0,
    }
    spec = {
        "name": "old",
        "trait": {**trait, "sites": ["layers.1.output"], "site": "layers.1.output"},
        "scope": "response",
        "arms": arms,
        "train": train,
        "drift": {"every_n_steps": 1, "sites": ["layers.1.output"], "controls": 4, "stream": True},
        "completions": {"prompts": ["who are you"], "max_new_tokens": 4},
    }
    assert written(spec) == 0
    metrics = read_metrics(tmp_path / "f")
    assert list(metrics["outcomes"]) == ["behaviour_gap", "task_logprob", "neutral_loss"]
    assert {arm["name"]: arm["when"] for arm in metrics["arms"]} == {name: arm.get("when", "never") for name, arm in arms.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trian": None}, "experiment has no key 'trian'\n  expected: name, question"),
        ({"primry": {"arm": "asked", "against": "plain"}}, "did you mean 'primary'"),
        ({"primary": {"arm": "asked", "agianst": "plain"}}, "experiment.primary has no key 'agianst'"),
        ({"train": {"steps": 2, "batch_size": 2}}, "experiment.train lacks 'learning_rate'"),
        ({"train": {"steps": 2, "batch_sizes": 2}}, "did you mean 'batch_size'"),
        ({"train": 24}, "experiment.train is no section"),
        ({"drift": {"every_n_steps": 2, "site": "layers.1.output"}}, "did you mean 'sites'"),
        (
            {
                "trait": {"name": "loud"},
                "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "max_length": 64},
                "drift": {"every_n_steps": 1, "sites": ["layers.1.output"], "features": {"warm": {"features": [5]}}},
            },
            "experiment.drift.features.warm says not which features are tracked",
        ),
        ({"completions": {"max_new_tokens": 4}}, "experiment.completions lacks 'prompts'"),
        ({"outcomes": None}, "one primary outcome"),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_a_key_that_is_misspelt_or_missing_is_named(
    written: Written, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    assert written({**LEAST, **change}, do="plan") == 2
    assert said in capsys.readouterr().err
