"""Runs a workload on several checkouts of this repository, each in a process of its own, in interleaved rounds.

What benchmarks/overhead.py and benchmarks/scaling.py have in common: workers that take turns (`workloads/worker.py` is their process), the
statistics of what they measured, and the record that is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
TIMEOUT = 900  # seconds until a worker that does not answer is given up
NOW, BEFORE = "now", "before"

Sample = dict[str, float]
Samples = dict[str, dict[str, list[Sample]]]  # label of the worker -> case -> one sample a round


class WorkerError(Exception):
    """A worker could not do its work; the message is the first line of its error."""


class MeasuresCases(Protocol):
    """What `interleave` asks of a worker."""

    label: str
    cases: list[str]
    notes: list[str]
    versions: dict[str, str]

    def measure(self, case: str) -> Sample: ...


class Worker:
    """A process that holds one workload on one checkout, and measures a case when asked.

    Args:
        label: names its samples, e.g. `now` or `before`.
        workload: module in benchmarks/workloads.
        arguments: JSON-able, for the module's `Workload`.
        checkout: root of a checkout from which `steer` is imported; None where `steer` is not needed.
        threads: of PyTorch.
        python: the interpreter.

    Raises:
        WorkerError: the workload could not be set up.
    """

    def __init__(
        self,
        label: str,
        workload: str,
        arguments: dict[str, Any],
        checkout: Path | None,
        *,
        threads: int = 1,
        python: Path | str = sys.executable,
    ) -> None:
        self.label = label
        task = {"checkout": checkout and str(checkout), "workload": workload, "arguments": arguments, "threads": threads}
        # an idle worker must not spin
        settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [python, HERE / "workloads" / "worker.py", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **settings},
        )
        started = self._answer()
        self.cases: list[str] = started["cases"]
        self.notes: list[str] = started["notes"]
        self.versions: dict[str, str] = started["versions"]

    def measure(self, case: str) -> Sample:
        """Raises WorkerError."""
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            raise WorkerError(f"worker '{self.label}' gave no answer{'' if ready else f' in {TIMEOUT} s'}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"worker '{self.label}': {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["nothing on standard error"])[-1]


Start = Callable[..., MeasuresCases]


@contextmanager
def workers_of(start: Start, workload: str, arguments: dict[str, Any], against: Path | None, threads: int) -> Iterator[list[MeasuresCases]]:
    """Workers on this checkout and on the one to compare with; stopped when the block ends.

    Args:
        start: makes a worker, `Worker` unless in a test.
    """
    checkouts = {NOW: REPOSITORY} if against is None else {BEFORE: against.expanduser().resolve(), NOW: REPOSITORY}
    with ExitStack() as stack:
        workers = []
        for label, checkout in checkouts.items():
            worker = start(label, workload, arguments, checkout, threads=threads)
            stack.callback(getattr(worker, "stop", lambda: None))
            workers.append(worker)
        yield workers


def interleave(workers: Sequence[MeasuresCases], rounds: int) -> Samples:
    """Measures every case of every worker once a round: the workers take turns case by case, in the opposite order of the round before.

    Shows its progress on a terminal and is silent elsewhere.
    """
    samples: Samples = {worker.label: {case: [] for case in worker.cases} for worker in workers}
    cases = list(dict.fromkeys(case for worker in workers for case in worker.cases))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=rounds * sum(len(worker.cases) for worker in workers))
        for number in range(rounds):
            order = 1 if number % 2 == 0 else -1
            for case in cases[::order]:
                for worker in workers[::order]:
                    if case in worker.cases:
                        progress.update(task, description=f"round {number + 1} of {rounds}, {worker.label}, {case}")
                        samples[worker.label][case].append(worker.measure(case))
                        progress.advance(task)
    return samples


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median over the rounds, its 95 % interval from a bootstrap over them, smallest and largest."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(2000))
    return {
        "median": statistics.median(values),
        "low": medians[len(medians) // 40],
        "high": medians[-1 - len(medians) // 40],
        "min": min(values),
        "max": max(values),
    }


def common_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the arguments that the benchmarks share."""
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout of this repository, measured in the same rounds")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that every case is measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file of the record (default: benchmarks/results/<date>_cpu_<name>.json)")


def write_record(
    name: str, arguments: argparse.Namespace, workers: Sequence[MeasuresCases], results: dict[str, Any], samples: Samples
) -> Path:
    """Writes date, versions, arguments, results and samples as JSON. Returns the file."""
    path: Path = arguments.out or HERE / "results" / f"{date.today()}_cpu_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkouts = {BEFORE: arguments.against and commit_of(arguments.against), NOW: commit_of(REPOSITORY)}
    record = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "versions": {worker.label: worker.versions for worker in workers},
        "commits": checkouts,
        "arguments": {
            key: value for key, value in vars(arguments).items() if not isinstance(value, Path) and key not in ("out", "against")
        },
        "notes": list(dict.fromkeys(note for worker in workers for note in worker.notes)),
        "results": results,
        "samples": samples,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def commit_of(checkout: Path) -> str | None:
    """Abbreviated commit of a checkout, `+` behind it where files differ from that; None where git does not say."""
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed.strip() else commit
