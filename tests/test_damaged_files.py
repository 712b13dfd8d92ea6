"""Every kind of file that the library reads, damaged at random: it loads as it was, or ends in a typed error, soon, in little memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from damage import DAMAGE
from directions.test_foreign import good_files, layer
from drift.test_schema_1 import old_store
from drift.test_store import measurement, writer

import steer
from steer import files
from steer.circuits.mib import read_mib, write_mib
from steer.circuits.mib_circuit import MibCircuit, MibShape
from steer.commands.generate import read_run
from steer.directions import Direction, Directions
from steer.drift.store import DriftStore
from steer.experiment.data import read_jsonl
from steer.intervene import Add, Intervention, Linear, Plan, ProbeGate
from steer.training.state import flatten, unflatten

ROUNDS = 25  # of each damage to each file
SECONDS = 20  # that a load may take at most


@dataclass
class Kind:
    """A kind of file.

    Attributes:
        make: writes one to a new folder and returns its path: a file, or a folder with several.
        load: what it says, comparable.
        is_sealed: what was altered has to be seen. Formats of others without a checksum may load as something else.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    is_sealed: bool = False


def plan_values(plan: Plan) -> Any:
    tensors = [{name: tensor.tolist() for name, tensor in intervention.tensors.items()} for intervention in plan.interventions]
    return [intervention.to_dict() for intervention in plan.interventions], tensors, plan.step, plan.fingerprint


def direction_values(directions: Directions) -> Any:
    entries = {str(site): (one.vector.tolist(), one.method, one.span, one.metrics, one.fitted_on) for site, one in directions.items()}
    return directions.name, directions.provenance, entries


def save_plan(name: str, folder: Path) -> Path:
    gate = ProbeGate(layer(1), sharpness=1.0).train() & ~ProbeGate(layer(2), site="layers.0.output")
    first = Intervention(Add(layer(1)).train(), "layers.1.output", "response", 1.5, schedule=Linear(40), gate=gate)
    return Plan([first, Intervention(Add(layer(3)), "embed")], fingerprint={"model_type": "llama", "width": 8}, step=3).save(folder / name)


def save_directions(name: str, folder: Path) -> Path:
    metrics = {"auc": 0.9, "dprime": 1.25, "gap": 2.0}
    entries = [Direction(f"layers.{n}.output", layer(n), "caa", "response", metrics) for n in (1, 2)]
    return Directions(entries, "warm", {"seed": 3, "fitted_on": ["ab", "cd"], "model": {"width": 8}}).save(folder / name)


def save_state(folder: Path) -> Path:
    own = {"base": torch.ones(1), "enabled": True, "window": (None, 3), "learned": {"vector": layer(1)}}
    return files.save_artifact(
        folder / "state.safetensors", "steering_state", flatten({"step": 4, "interventions": {"own": own}}, {"own": 9}), {}
    )


def load_state(path: Path) -> Any:
    return repr(unflatten(files.load_artifact(path, "steering_state")[1]))


def save_metrics(folder: Path) -> Path:
    config = {
        "model": {"name": "tiny", "dtype": "float32"},
        "experiment": {"arms": {"a": {"when": "never"}}, "completions": {"prompts": ["Hi"]}},
    }
    metrics = {"schema": 2, "config": config, "verdict": "specific", "n": 24}
    return files.atomic_write(folder / "metrics.json", json.dumps(files.sealed(metrics), indent=1))


def load_metrics(path: Path) -> Any:
    metrics = read_run(path.parent)
    return [metrics.get(name) for name in ("schema", "config", "verdict", "n")]


def save_store(folder: Path) -> Path:
    with writer(folder / "drift.sqlite") as store:
        for step in (0, 10):
            store.append(measurement(step))
    (folder / "drift.sqlite.lock").unlink()
    return folder / "drift.sqlite"


def load_store(path: Path) -> Any:
    with DriftStore(path) as store:
        return repr((store.fingerprint, store.tracked(), store.attempts(), store.records(), store.series("rude", "layers.1.output")))


def save_lines(folder: Path) -> Path:
    return files.atomic_write(folder / "train.jsonl", "".join(f'{{"prompt": "number {n}", "answer": "{n}"}}\n' for n in range(4)))


def bare(name: str, folder: Path) -> Path:
    vectors = {f"layer_{n}": layer(n) for n in (1, 2)}
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, layer(1).numpy())
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{key: vector.numpy() for key, vector in vectors.items()})
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(vectors, path)
    else:
        torch.save(vectors, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return path


def load_bare(path: Path) -> Any:
    site = "layers.1.output" if path.suffix == ".npy" else "layers.{layer}.output"
    return direction_values(steer.import_directions(path, site=site))


def foreign(name: str, folder: Path) -> Path:
    path, _ = good_files(folder / "all")[name]
    target = folder / path.name
    path.rename(target)
    shutil.rmtree(folder / "all")
    return target


def load_foreign(name: str, path: Path) -> Any:
    if name == "pyvene":
        return plan_values(steer.import_plan(path, scope="all"))
    return direction_values(steer.import_directions(path, name, n_layers=4))


def save_mib(name: str, folder: Path) -> Path:
    shape = MibShape(2, 2, 3)
    scores = torch.arange(105.0).view(7, 15) / 7
    return write_mib(folder / name, MibCircuit(shape, scores, scores > 5, scores[:, 0] > 5, neurons=scores[:, :3] > 5))


def load_mib(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in read_mib(path).tensors().items()}


KINDS = {
    **{f"plan {name}": Kind(partial(save_plan, name), lambda path: plan_values(Plan.load(path)), True) for name in ("p", "p.safetensors")},
    **{
        f"directions {name}": Kind(partial(save_directions, name), lambda path: direction_values(Directions.load(path)), True)
        for name in ("d", "d.safetensors")
    },
    "state": Kind(save_state, load_state, True),
    "metrics": Kind(save_metrics, load_metrics, True),
    **{f"circuit {name}": Kind(partial(save_mib, name), load_mib) for name in ("c.json", "c.pt")},
    "drift store": Kind(save_store, load_store),
    "drift store, schema 1": Kind(lambda folder: old_store(folder / "old.sqlite"), load_store),
    "lines": Kind(save_lines, lambda path: read_jsonl(path, ("prompt", "answer"))),
    **{f"bare {name}": Kind(partial(bare, name), load_bare, True) for name in ("v.pt", "v.npz")},
    **{f"bare {name}": Kind(partial(bare, name), load_bare) for name in ("v.npy", "v.safetensors", "v.old")},
    **{
        name: Kind(partial(foreign, name), partial(load_foreign, name))
        for name in ("cast", "easyedit", "gguf", "hidden-directions", "persona", "pyvene", "refusal", "repsteer", "steering-vectors")
    },
}  # fmt: skip


def outcome(kind: Kind, path: Path, original: Any) -> str:
    """What becomes of a load: `same`, `other`, or `typed`; anything else is raised."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"{path} is still being read after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        loaded = kind.load(path)
    except steer.SteerError as error:
        assert error.what and error.remedy and str(error.expected)
        return "typed"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "same" if loaded == original else "other"


def campaign(name: str, folder: Path, rounds: int, seed: int = 0) -> Counter[str]:
    """Damages each file of a kind in each way, and counts what became of it; an untyped error is counted by its name."""
    kind = KINDS[name]
    chance = random.Random(f"{name} {seed}")
    path = kind.make(folder)
    original = kind.load(path)
    victims = [path] if path.is_file() else sorted(path.iterdir())
    counts: Counter[str] = Counter()
    for victim in victims:
        content = victim.read_bytes()
        is_json = content.lstrip()[:1] in (b"{", b"[") and victim.suffix != ".jsonl"
        for damage in DAMAGE.values() if is_json else (DAMAGE["flipped"], DAMAGE["cut"]):
            for _ in range(rounds):
                victim.write_bytes(damaged := damage(content, chance))
                try:
                    counts[outcome(kind, path, original)] += 1
                except Exception as error:
                    counts[f"untyped {type(error).__name__}: {str(error)[:80]}, of {damaged[:40]!r}"] += 1
        victim.write_bytes(content)
    return counts


@pytest.mark.skipif(sys.platform == "win32", reason="needs alarms")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_seen_or_does_no_harm(name, tmp_path):
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = campaign(name, tmp_path, ROUNDS)
    allowed = {"typed", "same"} | ({"other"} if not KINDS[name].is_sealed else set())
    assert set(counts) <= allowed and counts["typed"] > 0.3 * counts.total(), counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 500 * 1024  # KiB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plan p", "directions d", "metrics"])
def test_content_that_makes_no_sense_is_refused(name, tmp_path):
    """As files of 0.1.0 have no seal, nothing but the readers themselves looks at what is in them."""
    counts = nonsense(name, tmp_path, 6 * ROUNDS)
    assert set(counts) <= {"typed", "same", "other"} and counts["typed"] > 0.3 * counts.total(), counts


def nonsense(name: str, folder: Path, rounds: int, seed: int = 0) -> Counter[str]:
    """Rewrites the manifest of a kind as one that no seal protects, and counts what became of it."""
    kind = KINDS[name]
    chance = random.Random(f"{name} {seed}")
    path = kind.make(folder)
    original = kind.load(path)
    victim = path / "manifest.json" if path.is_dir() else path
    content = json.loads(victim.read_bytes()) | {"schema": 1}
    del content[files.SEAL]
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        victim.write_bytes(damaged := DAMAGE["rewritten"](json.dumps(content).encode(), chance))
        try:
            counts[outcome(kind, path, original)] += 1
        except Exception as error:
            counts[f"untyped {type(error).__name__}: {str(error)[:80]}, of {damaged.decode('utf-8', 'replace')}"] += 1
    return counts
