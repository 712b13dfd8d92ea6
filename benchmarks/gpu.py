"""The kernels on a GPU: right, fast, and what steering and monitoring cost a decoder of 8B shape. One call, meant to stay
below 8 minutes on a H200.

    python benchmarks/gpu.py [--out results.json] [--only kernels|model|sweep] [--dry]

First every kernel is compared with float64 on the card; nothing is timed when one of them is wrong. Then each is timed beside PyTorch
operations and Inductor, as a fraction of the bandwidth that a copy reaches in the same run; then prefill, decoding and a training step
of a random decoder with 32 layers of width 4,096, bare and with each kind of intervention, in turns. Weights are random: only times are
read.

`--only sweep` does something else, meant to take less than four minutes: it tries other launch parameters than the defaults (gpu_sweep.py).

`--dry` goes through all of it on a CPU with tiny sizes, to test this script; its numbers mean nothing. The package must be installed,
if need be with `pip install --no-deps --no-build-isolation .`: of its dependencies only torch, Triton, transformers and safetensors are
used here.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Sizes, copy_bandwidth
from gpu_kernels import check, edges, features, kernels, peers, small
from gpu_sweep import fastest, sweep

RESULTS = Path(__file__).parent / "results"
# (where, row, column) -> what is aimed at; see docs/kernels.md
GOALS: dict[str, tuple[Callable[[dict[str, Any]], list[float]], float, bool]] = {
    "fraction of the copy bandwidth, forward": (lambda results: _fractions(results), 0.90, True),
    "16 features against 1": (lambda results: _features(results, 16), 1.1, False),
    "64 features against 1": (lambda results: _features(results, 64), 1.5, False),
    "256 features against 1": (lambda results: _features(results, 256), 3.0, False),
    "dictionary against 16 features": (lambda results: _dictionary(results), 300.0, True),
    "decoding in a CUDA graph, static": (lambda results: _cost(results, "decode, CUDA graph", "add, baked into biases"), 1.005, False),
    "decoding in a CUDA graph, one vector": (lambda results: _cost(results, "decode, CUDA graph", "add"), 1.02, False),
    "decoding in a CUDA graph, 3 vectors": (lambda results: _cost(results, "decode, CUDA graph", "3 vectors"), 1.03, False),
    "decoding in a CUDA graph, 256 rows": (
        lambda results: _cost(results, "decode 256 rows, CUDA graph", "a vector for each row"),
        1.03,
        False,
    ),
    "training step, drift at every layer": (lambda results: _cost(results, "training step", "drift, 8 directions"), 1.005, False),
    "training step, add": (lambda results: _cost(results, "training step", "add"), 1.003, False),
    "training step, add, norm kept": (lambda results: _cost(results, "training step", "add, norm kept"), 1.006, False),
    "time of peers against ours, same inputs": (lambda results: [row["times ours"] for row in results["peers"]], 1.0, True),
}


def _fractions(results: dict[str, Any]) -> list[float]:
    return [row["fraction"] for row in results["kernels"] if "backward" not in row["task"]]


def _features(results: dict[str, Any], m: int) -> list[float]:
    return [row["against 1"] for row in results["features"] if row["features"] == m and row["path"] == "chosen"]


def _dictionary(results: dict[str, Any]) -> list[float]:
    ours = [row["ms"] for row in results["features"] if row["features"] == 16 and row["path"] == "chosen"]
    all_features = [row["ms"] for row in results["features"] if row["path"] == "whole dictionary"]
    return [all_features[0] / ours[0]] if ours and all_features else []


def _cost(results: dict[str, Any], work: str, arm: str) -> list[float]:
    return [row["ratio"] for row in results["model"] if (row["work"], row["arm"]) == (work, arm) and "ratio" in row]


def versions() -> dict[str, str]:
    installed = {"python": sys.version.split()[0]}
    for name in ("torchsteer", "torch", "triton", "transformers"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def table(title: str, rows: Iterable[dict[str, Any]]) -> None:
    """Prints rows under the names of their entries."""
    lines = list(rows)
    if not lines:
        return
    names = list(dict.fromkeys(name for row in lines for name in row))
    cells = [names, *([_shown(row.get(name)) for name in names] for row in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(f"\n{title}")
    for line in cells:
        print(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        )


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside the worst value that was measured for it."""
    rows = []
    for name, (read, limit, at_least) in GOALS.items():
        values = [value for value in read(results) if value == value]
        worst = (min(values) if at_least else max(values)) if values else None
        met = None if worst is None else worst >= limit if at_least else worst <= limit
        rows.append(
            {
                "goal": name,
                "limit": f"{'>=' if at_least else '<='} {limit}",
                "worst": worst,
                "met": {None: "-", True: "yes", False: "no"}[met],
            }
        )
    return rows


def measure(sizes: Sizes, only: str | None) -> dict[str, Any]:
    """Times the kernels alone and a decoder: everything except the sweep."""
    results: dict[str, Any] = {"kernels": [], "features": [], "edges": [], "small": [], "peers": [], "model": []}
    if only != "model":
        results["copy TB/s"] = copy_bandwidth(sizes)
        results["kernels"] = kernels(sizes, results["copy TB/s"])
        results["features"] = features(sizes)
        results["edges"] = edges(sizes, results["copy TB/s"])
        results["small"] = small(sizes)
        results["peers"] = peers(sizes)
    if only != "kernels":
        from gpu_model import decoder_costs  # here, because it loads transformers, which takes seconds

        results["model"] = decoder_costs(sizes)
    results["goals"] = judged(results)
    if "copy TB/s" in results:
        table(f"one activation {list(sizes.shape)} in bf16; a copy moves {results['copy TB/s']:.2f} TB/s", results["kernels"])
    table(f"clamping features of {sizes.features:,}", results["features"])
    table("edge scores of a pair of layers", results["edges"])
    table("few tokens, eager", results["small"])
    table("peers, same inputs", results["peers"])
    table("decoder", results["model"])
    table("goals", results["goals"])
    return results


def measure_launches(sizes: Sizes) -> dict[str, Any]:
    """The sweep over launch parameters."""
    bandwidth = copy_bandwidth(sizes)
    rows = sweep(sizes, bandwidth)
    table(f"launch parameters, activations in bf16; a copy moves {bandwidth:.2f} TB/s", rows)
    table("the fastest", fastest(rows))
    return {"copy TB/s": bandwidth, "sweep": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/<date>_gpu.json without it (_gpu_sweep.json for the sweep)")
    parser.add_argument("--only", choices=("kernels", "model", "sweep"), help="one half of it, or the sweep over launch parameters")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: tests the script")
    chosen = parser.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry tries the script without one")
    started = time.time()
    sizes = Sizes.dry() if chosen.dry else Sizes.full()
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "card": "CPU (dry)" if chosen.dry else torch.cuda.get_device_name(),
        "versions": versions(),
        "arguments": {"only": chosen.only, "dry": chosen.dry},
    }
    if chosen.only == "sweep":  # which checks each variant itself
        results |= measure_launches(sizes)
    else:
        results["correctness"] = check(sizes)
        table(f"{results['card']}: against float64 on the card", results["correctness"])
        if not all(row["right"] for row in results["correctness"]):
            print("\na kernel is wrong; nothing was timed")
            return 1
        results |= measure(sizes, chosen.only)
    results["seconds"] = time.time() - started
    out = chosen.out or RESULTS / f"{results['date']}_gpu{'_sweep' * (chosen.only == 'sweep')}.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{results['seconds']:.0f} s; written to {out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
