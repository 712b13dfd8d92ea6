"""benchmarks/gpu.py without a GPU: it goes through all that it measures, and refuses to time what is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_a_dry_run_fills_every_table(tmp_path: Path) -> None:
    done = run(SCRIPT, "--dry", "--out", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["card"] == "CPU (dry)" and results["versions"]["torch"] and results["date"]
    assert len(results["correctness"]) > 40 and all(row["right"] for row in results["correctness"])
    assert all(row["us"] > 0 and row["eager us"] > 0 for row in results["kernels"]) and len(results["kernels"]) > 20
    assert {row["features"] for row in results["features"]} >= {1, 16, 64, 256} and results["features"][-1]["path"] == "whole dictionary"
    assert all(row["us"] > 0 and row["contraction us"] > 0 and row["eager us"] > 0 for row in results["edges"]) and results["edges"]
    assert all(row["operations us"] > 0 and row["kernel us"] > 0 for row in results["small"])
    works = {row["work"] for row in results["model"]}
    assert works == {"prefill", "decode", "decode, CUDA graph", "decode 256 rows, CUDA graph", "training step"}
    assert not [row for row in results["model"] if "failed" in row]
    assert [row["ratio"] for row in results["model"] if row["arm"] == "bare"] == [1.0] * 5
    unmeasured = [row["goal"] for row in results["goals"] if row["worst"] is None]
    assert unmeasured == ["time of peers against ours, same inputs"]
    for name in ("against float64", "clamping features", "decoder", "goals"):
        assert name in done.stdout


def test_nothing_is_timed_when_a_kernel_is_wrong(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu, gpu_kernels
real = gpu_kernels.edit
gpu_kernels.edit = lambda *args, **options: real(*args, **options) * (1.01 if args[0].dtype.itemsize < 8 else 1)
sys.exit(gpu.main(["--dry", "--out", sys.argv[1]]))
"""
    done = run("-c", code, tmp_path / "results.json")
    assert done.returncode == 1 and "a kernel is wrong; nothing was timed" in done.stdout and not list(tmp_path.iterdir())


def test_a_dry_sweep_has_a_row_for_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    assert gpu.main(["--dry", "--only", "sweep", "--out", str(tmp_path / "sweep.json")]) == 0
    results = json.loads((tmp_path / "sweep.json").read_text())
    rows = results["sweep"]
    assert len(rows) == 2 * 2 * (12 + 2 + 2) and all(row["us"] > 0 and row["fraction"] > 0 for row in rows)
    assert [row["against default"] for row in rows if row["default"]] == [1.0] * (2 * 2 * 3)
    printed = capsys.readouterr().out
    assert "launch parameters" in printed and "reverse True" in printed and "the fastest" in printed


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(SCRIPT)
    assert done.returncode == 2 and "there is no GPU here; --dry tries the script without one" in done.stderr
