"""steer beside its peers: extraction, prefill and decoding, each library in its own environment, in one interleaved run.

    python benchmarks/steering.py --environments DIR [--peers repeng pyvene ...] [--rounds 7] [--threads 1] [--memory 10] [--out FILE]

The first run makes one virtual environment per peer in DIR (minutes and about a gigabyte each), from wherever pip is configured to look.
Every arm is a process of its own that holds the model (`benchmarks/peers/worker.py`; the weights are one memory-mapped file). They take
turns over pipes, one at a time: in every round each column is done by every arm, in the opposite order of the round before. Compared is
the CPU time that the process itself measures, which other programs disturb less than wall time; both are recorded. Figures are the median
over rounds of the ratio to another arm in the same round, with the smallest and the largest. `plain again` shows the noise. A first pass,
which does not count, compares what the arms compute; what takes more than five times as long there as by hand is then timed once only.

Wrappers and plans are made before the clock starts. All arms steer the same layers by the same vectors at every token. Memory is the most
that a process ever held, and how much of that came on top of libraries and weights: what an environment has installed besides counts in
the first of these, since transformers imports some of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoTokenizer

from steer.commands.info import versions
from steer.model import embedded

HERE = Path(__file__).resolve().parent
OWN = ("plain", "hook", "steer")
# what each peer's environment is made of, besides torch
PEERS = {
    "steering-vectors": ("steering-vectors==0.12.2",),
    "repeng": ("repeng==0.4.0",),
    "nnsight": ("nnsight==0.8.1",),
    "nnterp": ("nnterp==1.3.0", "nnsight<0.8"),  # cannot be imported with the nnsight 0.8 that it allows
    "pyvene": ("pyvene==0.1.8",),
    "transformer-lens": ("transformer-lens==4.3.0", "transformers<5.24"),  # from 5.24 on its generate loses the cache, steered or not
    "repsteer": ("repsteer==0.2.4",),
}
BATCH = 32  # texts per forward pass of an extraction
PATIENCE = 1200  # seconds until an arm that does not answer is given up
SLOW = 5  # times the hook arm's
SHARE_OF_ALL = 0.03  # of each layer's vector, when all layers are steered
NOUNS = ("garden", "journey", "letter", "winter", "kitchen", "river", "picture", "meeting")
PLACES = ("city", "village", "school", "forest")
ENDINGS = ("again", "today")
TEMPLATE = (
    "When I think about the {noun} near the {place}, I feel so {feeling} that I tell everyone about it {ending}, "
    "and the whole day is {feeling}"
)


def texts() -> list[tuple[str, str]]:
    """64 pairs (positive, negative) of equally many tokens, so that no arm is helped by how it pads or sorts."""
    return [
        tuple(TEMPLATE.format(noun=noun, place=place, ending=ending, feeling=feeling) for feeling in ("happy", "sad"))  # type: ignore[misc]
        for noun in NOUNS
        for place in PLACES
        for ending in ENDINGS
    ]


def columns(tokenizer: Any, layers: int, new: int) -> dict[str, dict[str, Any]]:
    """What is measured: name -> the work that `peers/worker.py` does for it."""
    pairs = texts()
    ids = [tokenizer(text).input_ids for pair in pairs for text in pair]
    lengths = {len(row) for row in ids}
    assert len(lengths) == 1, f"the texts have {sorted(lengths)} tokens; give all of them the same number"
    running = [token for row in ids for token in row]
    every, middle = list(range(layers)), [layers // 2]

    def block(batch: int, tokens: int) -> list[list[int]]:
        return [running[row * tokens : (row + 1) * tokens] for row in range(batch)]

    single, eight = [ids[0][:16]], [row[:16] for row in ids[::16]]
    return {
        "extract middle": {"work": "extract", "layers": middle},
        "extract all": {"work": "extract", "layers": every},
        "prefill 1x256": {"work": "forward", "layers": middle, "share": 1.0, "ids": block(1, 256)},
        "prefill 8x128": {"work": "forward", "layers": middle, "share": 1.0, "ids": block(8, 128)},
        f"decode {new} b1": {"work": "generate", "layers": middle, "share": 1.0, "ids": single, "new": new},
        f"decode {new} b1, all layers": {"work": "generate", "layers": every, "share": SHARE_OF_ALL, "ids": single, "new": new},
        f"decode {new} b8": {"work": "generate", "layers": middle, "share": 1.0, "ids": eight, "new": new},
    }


def environment(folder: Path, peer: str, packages: tuple[str, ...]) -> Path:
    """Returns the interpreter of a peer's virtual environment. Builds the environment first if it is missing or has other versions."""
    pins = (HERE.parent / "constraints" / "cpu.txt").read_text().splitlines()
    requirements = [next(line for line in pins if line.startswith("torch==")), *packages]
    place, record = folder / peer, folder / peer / "made-of.txt"
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not record.is_file() or record.read_text().split("\n") != requirements:
        Console(stderr=True).print(f"making the environment of {peer} in {place}")
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        record.write_text("\n".join(requirements))
    return python


class Failed(Exception):
    """An arm could not do its work; the message is the first line of its error."""


class Worker:
    """The process of one arm."""

    def __init__(self, name: str, python: Path | str, job: Path, log: Path) -> None:
        self.name, self.peak_mb, self.idle_mb = name, 0.0, 0.0
        adapter = HERE / "peers" / f"{name.replace('-', '_')}.py"
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
        # an idle worker must not spin, and none may use more threads than the others
        threads = {"OMP_NUM_THREADS": str(json.loads(job.read_text())["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name in OWN}
        self.process = subprocess.Popen(
            [python, "-P", HERE / "peers" / "worker.py", adapter, job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**inherited, **offline, **threads},
        )
        started = self.answer()
        self.versions, self.idle_mb = started["versions"], started["idle_mb"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            raise Failed(f"no answer in {PATIENCE} s" if not ready else f"the process ended with code {self.process.returncode}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        self.peak_mb = max(self.peak_mb, reply.get("peak_mb", 0.0))
        return reply

    def ask(self, column: str, keep: Path | None = None) -> dict[str, Any]:
        """{cpu, wall} in seconds, peak_mb. Raises Failed."""
        if self.process.poll() is not None:
            raise Failed(f"the process ended with code {self.process.returncode}")
        assert self.process.stdin is not None
        print(json.dumps({"column": column, "keep": keep and str(keep)}), file=self.process.stdin, flush=True)
        return self.answer()

    def held_mb(self) -> float:
        """Memory that it holds now, the shared weights divided among those who share them (Linux only)."""
        try:
            lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0.0
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


Outcome = dict[str, dict[str, Any]]  # arm -> column -> a list of measurements, or the error's first line


def first_pass(
    arms: dict[str, Path | str], job: Path, names: list[str], limit_mb: float, stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, str], Outcome]:
    """Starts the arms one after the other while they fit into memory; each does every column once and keeps the results.

    Returns:
        The live workers; what kept the others from starting; for each arm and column its seconds, or the error.
    """
    folder = job.parent
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    outcome: Outcome = {}
    for arm, python in arms.items():
        held = sum(live.held_mb() for live in workers.values())
        largest = max((live.peak_mb for live in workers.values()), default=0.0)
        if held + largest > limit_mb:
            absent[arm] = f"not started: the others hold {held / 1024:.1f} GiB of {limit_mb / 1024:.1f}"
            continue
        try:
            worker = Worker(arm, python, job, folder / f"{arm}.log")
        except Failed as error:
            absent[arm] = str(error)
            continue
        stack.callback(worker.stop)
        workers[arm], outcome[arm] = worker, {}
        for column in names:
            try:
                # the hook arm's vectors are the ones that all arms steer by
                keep = folder / ("vectors" if (arm, column) == ("hook", "extract all") else f"{arm}.{column}")
                outcome[arm][column] = worker.ask(column, keep)["cpu"]
            except Failed as error:
                outcome[arm][column] = str(error)
    return workers, absent, outcome


def compare(folder: Path, arm: str, column: str, work: str) -> float | None:
    """Compares an arm's result with the hook arm's: smallest cosine, largest difference of a logit, share of equal tokens."""
    files = [folder / ("vectors" if (name, column) == ("hook", "extract all") else f"{name}.{column}") for name in ("hook", arm)]
    if not all(file.is_file() for file in files):
        return None
    expected, actual = map(load_file, files)
    if work == "extract":
        if expected.keys() != actual.keys():
            return None
        return min(float(torch.cosine_similarity(expected[key], actual[key], dim=0)) for key in expected)
    ours, theirs = expected[work], actual[work]
    if ours.shape != theirs.shape:
        return None
    return float((ours - theirs).abs().max()) if work == "forward" else float((ours == theirs)[:, 16:].float().mean())


def interleave(workers: dict[str, Worker], first: Outcome, names: list[str], rounds: int) -> Outcome:
    """Measurements by arm and column, one a round; an error instead of the list where the arm failed."""
    order = [arm for worker in workers for arm in ([worker, "plain again"] if worker == "plain" else [worker])]
    owner = {arm: workers["plain" if arm == "plain again" else arm] for arm in order}
    taken: Outcome = {arm: {column: [] for column in names} for arm in order}
    for number in range(rounds):
        for column in names:
            for arm in order[:: 1 if number % 2 else -1]:
                once = first[owner[arm].name][column]
                if isinstance(once, str) or isinstance(taken[arm][column], str):
                    taken[arm][column] = taken[arm][column] or once
                    continue
                if number and once > SLOW * first["hook"][column]:
                    continue
                try:
                    taken[arm][column].append({"round": number, **owner[arm].ask(column)})
                except Failed as error:
                    taken[arm][column] = str(error)
        Console(stderr=True).print(f"round {number + 1} of {rounds}")
    return taken


def ratio(ours: Any, theirs: Any) -> list[float] | str:
    """Ratios of CPU time in the rounds that both measured; the error when either failed."""
    for measured in (theirs, ours):
        if isinstance(measured, str):
            return measured
    base = {run["round"]: run["cpu"] for run in theirs}
    return [run["cpu"] / base[run["round"]] for run in ours if run["round"] in base]


def cell(ratios: list[float] | str) -> str:
    if isinstance(ratios, str):
        return ratios if len(ratios) < 40 else f"{ratios[:39]}…"
    if not ratios:
        return ""
    spread = f" [{min(ratios):.2f}-{max(ratios):.2f}]" if len(ratios) > 1 else " (once)"
    return f"{statistics.median(ratios):.3f}{spread}"


Memory = dict[str, tuple[float, float]]  # arm -> MiB at most, MiB of these on top of libraries and weights


def goals(taken: Outcome, names: list[str], memory: Memory) -> Iterator[tuple[str, float, bool]]:
    """Goal, figure, reached."""

    def median(arm: str, base: str, column: str) -> float | None:
        ratios = ratio(taken[arm][column], taken[base][column])
        return None if isinstance(ratios, str) or not ratios else statistics.median(ratios)

    for column, base, most in (("extract middle", "hook", 0.5), ("extract all", "hook", 0.85), (names[5], "plain", 1.02)):
        share = median("steer", base, column)
        if share is not None:
            yield f"{column}: at most {most} of {base}", share, share <= most
    for column in names:
        against = {arm: median("steer", arm, column) for arm in taken if arm in PEERS}
        known = {arm: value for arm, value in against.items() if value is not None}
        if known:
            worst = max(known, key=lambda arm: known[arm])
            yield f"{column}: not slower than any peer (worst against {worst})", known[worst], known[worst] <= 1
    added = {arm: more for arm, (_, more) in memory.items() if arm in PEERS}
    if added:
        least, own = min(added, key=lambda arm: added[arm]), memory["steer"][1]
        yield f"memory added: not more than any peer (least: {least})", own / added[least], own <= added[least]


@contextmanager
def prepared(chosen: argparse.Namespace) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """The job file in a temporary folder, and the columns."""
    model = embedded.converted_folder() if chosen.model == embedded.NAME else Path(chosen.model)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    specs = columns(AutoTokenizer.from_pretrained(model), layers, chosen.new)
    with tempfile.TemporaryDirectory(prefix="steering-") as name:
        job = Path(name) / "job.json"
        spec = {"model": str(model), "threads": chosen.threads, "batch": BATCH, "pairs": texts(), "columns": specs}
        job.write_text(json.dumps({**spec, "vectors": str(job.parent / "vectors")}))
        yield job, specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' virtual environments, made where missing")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--model", default=embedded.NAME, help="the embedded model, or a folder with a Llama-like one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=64, help="decoded tokens")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB for all arms together; an arm beyond it is left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}_cpu_steering.json")
    chosen = parser.parse_args()
    environments = chosen.environments.expanduser().resolve()
    arms: dict[str, Path | str] = {name: sys.executable for name in OWN}
    arms |= {peer: environment(environments, peer, PEERS[peer]) for peer in chosen.peers}
    with prepared(chosen) as (job, specs), ExitStack() as stack:
        # the hook arm makes the vectors that every arm steers by
        arms = {"hook": arms.pop("hook"), **arms}
        workers, absent, first = first_pass(arms, job, list(specs), chosen.memory * 1024, stack)
        agreement = {arm: {column: compare(job.parent, arm, column, specs[column]["work"]) for column in specs} for arm in workers}
        taken = interleave(workers, first, list(specs), chosen.rounds)
        held = sum(worker.held_mb() for worker in workers.values())
    memory = {arm: (worker.peak_mb, worker.peak_mb - worker.idle_mb) for arm, worker in workers.items()}
    report(chosen, list(specs), taken, agreement, memory, absent)
    record = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "arms": {arm: worker.versions for arm, worker in workers.items()},
        "absent": absent,
        "arguments": {key: getattr(chosen, key) for key in ("model", "peers", "rounds", "threads", "new", "memory")},
        "batch": BATCH,
        "agreement": agreement,
        "peak_and_added_mb": memory,
        "all_held_mb": held,
        "measurements": taken,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1))


def report(
    chosen: argparse.Namespace, names: list[str], taken: Outcome, agreement: Outcome, memory: Memory, absent: dict[str, str]
) -> None:
    """Prints the tables, and which goals are reached."""
    console = Console(width=220)
    setting = f"{chosen.model}, {chosen.threads} thread(s), {chosen.rounds} rounds, CPU time"
    seconds = Table("arm", *names, "peak MiB (added)", title=f"median seconds ({setting})")
    for arm, row in taken.items():
        cells = [r if isinstance(r, str) else f"{statistics.median(run['cpu'] for run in r):.2f}" for r in row.values()]
        seconds.add_row(arm, *(cell(text) for text in cells), "{:.0f} ({:.0f})".format(*memory[arm]) if arm in memory else "")
    against = Table("arm", *names, title="ratio to the plain model; extraction: to the hook arm, which runs whole forward passes")
    for arm, row in taken.items():
        against.add_row(arm, *(cell(ratio(row[column], taken["hook" if "extract" in column else "plain"][column])) for column in names))
    ours = Table("arm", *names, "memory added", title="steer's time as a share of the arm's: 1 or less is not slower")
    for arm, row in taken.items():
        added = f"{memory['steer'][1] / memory[arm][1]:.2f}" if arm in memory else ""
        ours.add_row(arm, *(cell(ratio(taken["steer"][column], row[column])) for column in names), added)
    same = Table("arm", *names, title="agreement with the hook arm: smallest cosine, largest difference of a logit, share of equal tokens")
    for arm, agreed in agreement.items():
        kinds = (("prefill" in name, value) for name, value in agreed.items())
        same.add_row(arm, *("" if value is None else f"{value:.2g}" if is_logit else f"{value:.4f}" for is_logit, value in kinds))
    for table in (seconds, against, ours, same):
        console.print(table)
    for arm, why in absent.items():
        console.print(f"{arm}: {why}")
    for goal, figure, reached in goals(taken, names, memory):
        console.print(f"{'reached' if reached else 'MISSED '}  {figure:.3f}  {goal}")


if __name__ == "__main__":
    main()
