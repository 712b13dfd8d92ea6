"""benchmarks/overhead.py and scaling.py: a dry run of each, on tiny models, and what they are made of."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
WORKLOADS = BENCHMARKS / "workloads"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    for folder in (BENCHMARKS, WORKLOADS):
        monkeypatch.syspath_prepend(str(folder))


class InProcess:
    """A worker that measures in this process, always on this checkout."""

    def __init__(self, label: str, workload: str, arguments: dict[str, Any], checkout: Path | None, **_: Any) -> None:
        self.label = label
        self.workload = importlib.import_module(workload).Workload(arguments)
        self.cases = list(self.workload.cases)
        self.notes: list[str] = []
        self.versions = {"python": "3", "torch": torch.__version__, "transformers": "5"}

    def measure(self, case: str) -> dict[str, float]:
        return self.workload.measure(case)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_dry_run_of_overhead(tmp_path, capsys, monkeypatch):
    overhead = importlib.import_module("overhead")
    monkeypatch.setattr(importlib.import_module("hook_cost"), "TINY_LAYERS", 2)
    out = tmp_path / "overhead.json"
    arguments = ["--model", "tiny", "--rounds", "1", "--steps", "3", "--against", str(ROOT), "--out", str(out)]
    overhead.main(arguments, InProcess)
    record = json.loads(out.read_text())
    edits = record["results"]["edits"]
    assert set(edits) == set(overhead.EDITS) and record["arguments"]["steps"] == 3
    for edit, row in edits.items():
        expected = {"goal", "before", "now", "before % of step", "now % of step"}
        assert set(row) == expected | ({"hand", "hand % of step"} if edit != "window" else set())
        assert all(math.isfinite(number) and number > 0 for number in numbers(row))
    assert all(math.isfinite(number) for number in numbers(record["results"]))
    assert set(record["samples"]) == {"before", "now"} and len(record["samples"]["now"]["steer: add"]) == 1
    assert record["samples"]["now"]["steer: add"][0]["sites"] == 2
    printed = capsys.readouterr()
    assert "add a vector" in printed.out and not printed.err  # progress is for terminals


def test_dry_run_of_scaling(tmp_path, capsys, monkeypatch):
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(importlib.import_module("growth"), "LAYERS", 2)
    out = tmp_path / "scaling.json"
    scaling.main(["--quick", "--rounds", "1", "--against", str(ROOT), "--out", str(out)], InProcess)
    results = json.loads(out.read_text())["results"]
    assert set(results) == set(scaling.cases_of(scaling.QUICK))
    for row in results.values():
        assert row["goal"] is None and {"before", "now"} < set(row)
        assert all(math.isfinite(number) and number > 0 for number in numbers(row))
    assert "attach and detach, 12 sites" in capsys.readouterr().out
    assert scaling.cases_of(scaling.FULL)["attach"].goal == 45


def test_hooks_by_hand_edit_as_steer_does():
    hook_cost = importlib.import_module("hook_cost")
    workload = hook_cost.Workload({"model": "tiny", "steps": 1})
    workload.model.model.embed_tokens.weight.data.mul_(100)  # projections beyond the limits of the clamp
    ids = torch.randint(5, 100, (hook_cost.ROWS, 6), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(case: str) -> torch.Tensor:
        with workload.cases[case].attached():
            return workload.model(ids).logits

    bare = logits("timer")
    for edit in ("add", "ablate", "clamp", "gate", "norm kept", "rows"):
        by_hand = logits(f"hand: {edit}")
        torch.testing.assert_close(by_hand, logits(f"steer: {edit}"), atol=1e-4, rtol=1e-4)
        assert (by_hand - bare).abs().max() > 1e-3


def test_timer_times_every_hook_and_gives_them_back():
    hook_timer = importlib.import_module("hook_timer")
    module, calls = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda *arguments: calls.append(("before", len(arguments))), with_kwargs=True)
    module.register_forward_hook(lambda module, inputs, output: calls.append(("after", 3)) or output + 1)
    known = [dict(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    bare = module(torch.ones(1, 2))
    with hook_timer.HookTimer(module) as timer:
        assert torch.equal(module(torch.ones(1, 2)), bare)
        assert len(timer.nanoseconds) == 2 and all(taken > 0 for taken in timer.nanoseconds)
        timer.reset()
        assert timer.nanoseconds == []
    assert calls == 2 * [("before", 3), ("after", 3)]
    assert [dict(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)] == known


def test_an_interrupted_hook_does_not_count():
    per_pass = importlib.import_module("hook_timer").per_pass
    assert per_pass([[1000, 2000], [900_000, 2000], [1000, 800_000]]) == 3.0
    with pytest.raises(ValueError):
        per_pass([[1], [1, 2]])


def test_a_checkout_is_imported_from_its_path(tmp_path):
    for folder in ("steer", "callbacks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"here = {folder!r}")
    code = "import sys, worker; worker.use_checkout(sys.argv[1]); import steer, steer.callbacks; print(steer.here, steer.callbacks.here)"

    def run(checkout: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, checkout], cwd=WORKLOADS, capture_output=True, text=True)

    assert run(tmp_path).stdout.split() == ["steer", "callbacks"]
    assert "is no checkout of this repository" in run(tmp_path / "steer").stderr


def test_a_worker_that_cannot_start_says_why():
    checkouts = importlib.import_module("checkouts")
    with pytest.raises(checkouts.WorkerError, match="worker 'now': ModuleNotFoundError: No module named 'nothing'"):
        checkouts.Worker("now", "nothing", {}, ROOT)


def sample(hooks_us: float, calls: int = 30) -> list[dict[str, float]]:
    return [{"hooks_us": hooks_us, "rest_us": 60_000.0, "calls": calls, "sites": 30}]


def test_costs_are_net_of_an_empty_hook():
    overhead = importlib.import_module("overhead")
    samples = {"timer": sample(60.0), "hand: add": sample(360.0), "hand again: add": sample(420.0), "steer: add": sample(968.0, 34)}
    assert overhead.net_costs(samples, "hand: add") == [10.0]
    assert overhead.net_costs(samples, "steer: add") == [30.0]  # 34 calls of 2 us are taken off
    assert overhead.shares(samples, "steer: add") == [1.5]
    assert overhead.repeat_differences(samples) == pytest.approx([0.1])


@pytest.fixture
def tables(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    speed_tables = importlib.import_module("speed_tables")
    monkeypatch.setattr(speed_tables, "RESULTS", tmp_path)
    return speed_tables


def test_documentation_is_made_from_the_newest_record(tables, tmp_path):
    markdown = importlib.import_module("make_tables").markdown
    assert "Not measured" in tables.hook_cost(markdown) and "Not measured" in tables.growth(markdown)
    figures = {"median": 1.64, "low": 1.5, "high": 1.8, "min": 1.4, "max": 1.9}
    shared = {
        "date": "2026-12-01",
        "arguments": {"threads": 1, "rounds": 7},
        "commits": {"before": "326ad19", "now": "1234567"},
        "versions": {"now": {"torch": "2.13.0", "transformers": "5.23.0"}},
    }
    shares = {f"{name} % of step": figures for name in ("hand", "before", "now")}
    edit = {"goal": 10, "hand": figures, "before": figures, "now": figures, **shares}
    results = {
        "edits": {"add": edit, "window": {**{k: v for k, v in edit.items() if not k.startswith("hand")}, "goal": None}},
        "peers": {"repsteer": figures},
        "peers % of step": {"repsteer": figures},
        "A/A % of step": figures,
        "empty hook us": figures,
        "step ms": figures,
        "sites": 30,
    }
    (tmp_path / "2026-12-01_cpu_overhead.json").write_text(json.dumps({**shared, "results": results}))
    text = tables.hook_cost(markdown)
    assert "**30 additions take 1.6 % of a decode step** (1.6 % by hand, 1.6 % in 326ad19)." in text
    assert "| add a vector | 1.6 (1.4-1.9) | 1.6 (1.4-1.9) | 1.6 (1.4-1.9) | 10 reached | 1.0x |" in text and "repsteer" in text
    growth = {"make": {"text": "make a plan", "unit": "ms", "goal": 1, "before": figures, "now": figures}}
    (tmp_path / "2026-12-01_cpu_scaling.json").write_text(json.dumps({**shared, "results": growth}))
    assert "| make a plan | ms | 1.64 (1.40-1.90) | 1.64 (1.40-1.90) | 1 missed | 1.00 |" in tables.growth(markdown)
