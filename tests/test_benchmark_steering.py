"""The arms of benchmarks/steering.py that need no other environment, and what it makes of measurements."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WORK = {
    "extract middle": {"work": "extract", "layers": [1]},
    "extract all": {"work": "extract", "layers": [0, 1, 2]},
    "prefill": {"work": "forward", "layers": [1], "share": 1.0, "ids": [[5, 6, 7, 8], [9, 10, 11, 12]]},
    "decode": {"work": "generate", "layers": [0, 1, 2], "share": 0.5, "ids": [[5, 6, 7]], "new": 6},
}


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_benchmark", BENCHMARKS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steering() -> ModuleType:
    return module("steering.py")


def test_the_arms_compute_the_same(steering, tmp_path):
    worker, tokenizer = module("peers/worker.py"), tiny_tokenizer()
    model = FAMILIES["llama"]().eval()
    model.generation_config.eos_token_id = None
    job = {"pairs": [("the cat is on the mat", "a dog ran"), ("the sun", "a dog is in the house now")], "batch": 2}
    with torch.no_grad():
        for name in ("hook", "plain", "steer"):
            arm = worker.load_adapter(str(BENCHMARKS / "peers" / f"{name}.py")).Arm(model, tokenizer)
            for column, work in WORK.items():
                vectors = {} if "ids" not in work else {int(key[6:]): v for key, v in load_file(tmp_path / "vectors").items()}
                keep = tmp_path / ("vectors" if (name, column) == ("hook", "extract all") else f"{name}.{column}")
                measured = worker.measure(arm, work, job, vectors, keep)
                assert measured["cpu"] > 0 and measured["peak_mb"] > 100
    differences = {
        name: {column: steering.compare(tmp_path, name, column, work["work"]) for column, work in WORK.items()}
        for name in ("plain", "steer")
    }
    assert differences["steer"]["extract all"] > 1 - 1e-5 and differences["steer"]["prefill"] == 0
    assert differences["plain"]["extract middle"] > 1 - 1e-5 and differences["plain"]["prefill"] > 0.1
    assert torch.equal(*(load_file(tmp_path / f"{name}.decode")["generate"] for name in ("hook", "steer")))


def test_agreement_of_results_that_differ(steering, tmp_path):
    def keep(name: str, **tensors: torch.Tensor) -> None:
        save_file(tensors, tmp_path / name)

    keep("vectors", **{"layer.0": torch.tensor([1.0, 0.0]), "layer.1": torch.tensor([0.0, 1.0])})
    keep("one.extract all", **{"layer.0": torch.tensor([2.0, 0.0]), "layer.1": torch.tensor([3.0, 4.0])})
    keep("hook.decode", generate=torch.zeros(1, 20))
    keep("one.decode", generate=torch.tensor([[0.0] * 17 + [1.0] * 3]))
    assert steering.compare(tmp_path, "one", "extract all", "extract") == pytest.approx(0.8)
    assert steering.compare(tmp_path, "one", "decode", "generate") == 0.25  # of the four tokens after a prompt of 16
    assert steering.compare(tmp_path, "two", "decode", "generate") is None


def test_ratios_cells_and_goals(steering):
    def measured(*seconds: float) -> list[dict[str, Any]]:
        return [{"round": number, "cpu": second, "wall": second} for number, second in enumerate(seconds)]

    assert steering.ratio(measured(2, 6), measured(1, 2)) == [2, 3]
    assert steering.ratio(measured(2, 6), measured(4)) == [0.5]  # the other was timed once
    assert steering.ratio("ValueError: no", measured(1)) == "ValueError: no"
    assert steering.cell([2, 3]) == "2.500 [2.00-3.00]" and steering.cell([0.5]) == "0.500 (once)"
    names = ["extract middle", "extract all", "prefill", "decode", "more", "decode all"]
    seconds_of = {
        "plain": dict.fromkeys(names, measured(1, 1)),
        "hook": dict.fromkeys(names, measured(1, 1)),
        "steer": {name: measured(0.4, 0.4) for name in names},
        "repeng": {**dict.fromkeys(names, measured(0.8, 0.8)), "decode": measured(0.2, 0.2), "prefill": "RuntimeError: shape"},
    }
    reached = {goal: done for goal, _, done in steering.goals(seconds_of, names, {"steer": (900.0, 90.0), "repeng": (800.0, 100.0)})}
    assert [goal for goal, done in reached.items() if not done] == ["decode: not slower than any peer (worst against repeng)"]
    assert len(reached) == 3 + 5 + 1  # three goals of its own, a column that the peer did, each, and memory


def test_an_environment_is_made_once(steering, tmp_path, monkeypatch):
    installs: list[list[str]] = []
    monkeypatch.setattr(steering.venv, "create", lambda place, **_: place.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(steering.subprocess, "run", lambda command, **_: installs.append(list(map(str, command[-2:]))))
    for _ in range(2):
        assert steering.environment(tmp_path, "repeng", ("repeng==0.4.0",)).is_relative_to(tmp_path / "repeng")
    assert len(installs) == 1 and installs[0][0].startswith("torch==") and installs[0][1] == "repeng==0.4.0"
    steering.environment(tmp_path, "repeng", ("repeng==9.9",))
    assert installs[1][1] == "repeng==9.9"


@pytest.mark.real
def test_every_text_has_as_many_tokens(steering, smollm2):
    _, tokenizer = smollm2
    columns = steering.columns(tokenizer, 30, 4)
    assert len(steering.texts()) == 64 and len({text for pair in steering.texts() for text in pair}) == 128
    assert [len(columns[name]["ids"]) * len(columns[name]["ids"][0]) for name in list(columns)[2:]] == [256, 1024, 16, 16, 128]
    assert json.loads(json.dumps(columns)) == columns
