"""CPU time and memory of `select` with 16 candidates, `calibrate` with 9 slots and `extract` of 64 pairs, beside plain forward passes.

    python benchmarks/selection.py [--model smollm2-135m] [--rounds 3] [--threads 1] [--against PATH] [--out selection.json]

The unit is the CPU time of one plain forward pass over all texts of the work, each text once, taken in the same round. Memory is what the
process grows to while the work runs, the model included. With --against, another checkout of steer does the same work in a process of
its own, and the two take turns within each round, so that their ratio is that of neighbouring minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "steer" / "experiment" / "data" / "tone"  # the same texts for every checkout
WORKS = ("select", "calibrate", "extract, 30 layers", "extract, 1 layer")


class Checkout:
    """Import hook: finds `steer` in a checkout, by the folders that its pyproject.toml names."""

    def __init__(self, root: Path) -> None:
        named = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
        self.folders = {name: root / folder for name, folder in named.items()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]


class Worker:
    """One checkout with the model and the texts, in a process of its own."""

    def __init__(self, model: str, threads: int) -> None:
        import torch

        import steer
        from steer.model.load import load
        from steer.model.site import Site
        from steer.model.tokens import encode, plain

        torch.set_num_threads(threads)
        self.model, tokenizer = load(model)
        heldout = [{"prompt": r["prompt"], "positive": r["trait"], "negative": r["neutral"]} for r in records("heldout")]
        pairs = [*records("contrast"), *heldout]
        contrast = steer.ContrastSet.from_pairs(tokenizer, pairs[:64])
        judged = steer.ContrastSet.from_pairs(tokenizer, pairs[-16:])
        neutral = [plain(tokenizer, record["text"]) for record in records("neutral_text")[:8]]
        prompts = [encode(tokenizer, record["prompt"]) for record in records("probe")[:20]]
        n_layers, width = self.model.config.num_hidden_layers, self.model.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        sites = [Site.parse(f"layers.{layer}.output") for layer in range(4, 4 + 16)]
        candidates = [steer.Direction(site, torch.randn(width, generator=generator), "random", -1) for site in sites]
        middle = f"layers.{n_layers // 2}.output"
        direction = steer.Direction(
            Site.parse(middle), torch.randn(width, generator=generator), "random", "response", {"activation_norm": 30.0}
        )

        def select() -> Any:
            chosen = steer.select(self.model, candidates, showing=prompts[:10], lacking=prompts[10:], tokens=[57], progress=False)
            return [[one.bypass, one.induce, one.kl] for one in chosen.candidates]

        def calibrate() -> Any:
            curve = steer.calibrate(self.model, direction, judged, neutral, progress=False)
            return [[point.effect, point.kl, point.perplexity_ratio] for point in curve.points]

        def extract(sites: list[str]) -> Callable[[], Any]:
            def run() -> Any:
                found = steer.extract(self.model, contrast, sites, name="tone", progress=False)
                return [[entry.metrics["auc"], entry.metrics["gap"]] for entry in found.values()]

            return run

        answers = [*contrast.positive, *contrast.negative]
        self.works: dict[str, tuple[Callable[[], Any], Sequence[Any]]] = {
            "select": (select, prompts),
            "calibrate": (calibrate, [*judged.positive, *judged.negative, *neutral]),
            "extract, 30 layers": (extract(["layers.*.output"]), answers),
            "extract, 1 layer": (extract([middle]), answers),
        }

    def forward(self, texts: Sequence[Any]) -> None:
        """One plain forward pass over each text."""
        import torch

        from steer.model.capture import batches
        from steer.model.tokens import collate

        with torch.no_grad():
            for chosen in batches(texts, 2048):
                batch = collate([texts[i] for i in chosen], pad=0)
                self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def run(self, name: str) -> dict[str, Any]:
        """CPU seconds of one work and of the plain pass over its texts, and the most memory held meanwhile, in MiB."""
        work, texts = self.works[name]
        started = time.process_time()
        self.forward(texts)
        plain = time.process_time() - started
        before = _reset_peak()
        started = time.process_time()
        result = work()
        seconds = time.process_time() - started
        return {"seconds": seconds, "forward": plain, "peak": _peak(), "added": _peak() - before, "result": result}


def _reset_peak() -> float:
    """Memory held now, in MiB; from here on the peak counts anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(root: Path, model: str, threads: int) -> None:
    """Runs the works whose names come on the standard input, and answers each with a line of JSON."""
    sys.meta_path.insert(0, Checkout(root))
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(model, threads)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(line.strip())), file=answers, flush=True)


def ask(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another checkout of steer")
    parser.add_argument("--works", nargs="*", default=WORKS, choices=WORKS)
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve is not None:
        serve(chosen.serve, chosen.model, chosen.threads)
        return
    roots = {"here": ROOT} | ({"there": chosen.against.resolve()} if chosen.against is not None else {})
    options = ["--model", chosen.model, "--threads", str(chosen.threads)]
    processes = {}
    for name, root in roots.items():
        command = [sys.executable, __file__, "--serve", str(root), *options]
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes[name].stdout.readline()
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {work: {name: [] for name in roots} for work in chosen.works}
    for number in range(chosen.rounds):
        for work in chosen.works:
            for name in list(roots)[:: 1 if number % 2 else -1]:
                figures[work][name].append(ask(processes[name], work))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    report(figures)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"threads": chosen.threads, "figures": figures}, indent=1) + "\n", encoding="utf-8")


def report(figures: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Prints medians over rounds: CPU seconds, their ratio to the plain pass of the same round, memory, and here over there."""
    for work, checkouts in figures.items():
        for name, rounds in checkouts.items():
            ratio = statistics.median(taken["seconds"] / taken["forward"] for taken in rounds)
            seconds = statistics.median(taken["seconds"] for taken in rounds)
            peak = max(taken["peak"] for taken in rounds)
            print(f"{work:20s} {name:6s} {seconds:7.2f} s = {ratio:5.2f} forward passes, peak {peak:5.0f} MiB", flush=True)
        if len(checkouts) == 2:
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(checkouts["here"], checkouts["there"], strict=True)]
            pairs = zip(_flat(checkouts["here"][0]["result"]), _flat(checkouts["there"][0]["result"]), strict=True)
            apart = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
            print(f"{'':20s} here / there {statistics.median(ratios):.3f}; results differ by {apart:.1e} of their size at most")


def _flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


if __name__ == "__main__":
    main()
