"""The examples run, on the embedded model and few rows of their data; those that train, for one optimiser step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from experiment_helpers import few_rows

from steer.drift import DriftStore

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = {"plain_loop": ["--store", "drift.sqlite"], "lightning_sft": ["--out", "."], "trl_dpo": ["--out", "."]}
OTHERS = {  # name -> options that make it short, and what it says
    "calibrate": (["--sites", "layers.20.output", "--tokens", "8"], ["chosen", "steered:", "saved: plan"]),
    "edit_in_training": (["--steps", "1"], ["edit/", "after training: The Eiffel Tower", "reverted:"]),
    "feature": (["--tokens", "4", "--features", "1"], ["(the concept):", "(random):"]),
    "pronoun_circuit": (["--words", "teacher", "plumber"], ["|shift|:", "factual gap:"]),
}


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("smollm2")  # skips where the model is missing
@pytest.mark.parametrize("name", sorted(TRAINING))
def test_example_of_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "trl_dpo":
        pytest.importorskip("trl", reason="trl is an extra: pip install 'torchsteer[dev]'")
    monkeypatch.chdir(tmp_path)
    few_rows(monkeypatch, contrast=6, probe=3, train=8)
    run(name, ["--steps", "1", *TRAINING[name]], monkeypatch)
    with DriftStore("drift.sqlite") as store:
        assert {record.step for record in store.records() if record.mode == "probe"} == {0, 1}
        assert {record.direction for record in store.records() if record.kind == "named"} == {"gushing"}
    out = capsys.readouterr().out
    assert "drift" in out and (name == "lightning_sft" or "steered tokens" in out)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    few_rows(monkeypatch, train=4)
    options, said = OTHERS[name]
    run(name, options, monkeypatch)
    out = capsys.readouterr().out
    assert all(text in out for text in said), out


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as its command line runs it."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_is_run_here(name: str) -> None:
    assert name in TRAINING or name in OTHERS
