"""Two gloo ranks equal one process: DDP, FSDP2 (ModelParallelStrategy) and a distributed Hugging Face Trainer, kill and resume included."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from callback_helpers import PROMPT, ROWS, SITE, TOKENS, TRAIT, vector
from filelock import FileLock
from processes import run_on_ranks

from steer.drift import DriftRecord, DriftStore

TOKEN_KEY, STEP = f"add@{SITE}/tokens", 4 * (TOKENS - PROMPT)  # response tokens of one optimiser step, over all ranks
RESPONSE = ROWS * (TOKENS - PROMPT)
Results = dict[str, dict[str, Any]]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]


@pytest.fixture(scope="module")
def rank_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rank_worker", Path(__file__).with_name("rank_worker.py"))
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


@pytest.fixture(scope="module")
def folder(rank_worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of two ranks, computed once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{out}.lock"):
        if out.exists():
            return out
        scratch = tmp_path_factory.mktemp("scratch")
        run_on_ranks(rank_worker.main, scratch)
        scratch.rename(out)
    return out


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Results:
    return {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def single(rank_worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same runs in one process, with the batches of both ranks in one."""
    out = tmp_path_factory.mktemp("single")
    results: Results = {
        "lightning": rank_worker.lightning(rank_worker.Plain(), out / "lightning.sqlite", batch_size=4),
        "lightning-2": rank_worker.lightning(rank_worker.Plain(), out / "lightning-2.sqlite", batch_size=4, max_epochs=2),
        "hf": rank_worker.hugging_face(out / "hf", out / "hf.sqlite", batch_size=4),
        "hf-2": rank_worker.hugging_face(out / "hf", out / "hf.sqlite", batch_size=4, epochs=2, resume=True),
    }
    return results | {"folder": {"path": out}}


def records(path: Path) -> list[DriftRecord]:
    with DriftStore(path) as store:
        return store.records()


def assert_close_records(ours: list[DriftRecord], theirs: list[DriftRecord]) -> None:
    assert [(record.step, record.mode, record.direction, record.n) for record in ours] == [
        (record.step, record.mode, record.direction, record.n) for record in theirs
    ]
    assert [record.mean for record in ours] == pytest.approx([record.mean for record in theirs], abs=2e-6)
    assert [record.change for record in ours] == pytest.approx([record.change for record in theirs], abs=2e-6)


PAIRS = [
    ("ddp", "lightning"),
    ("ddp-resumed", "lightning-2"),
    ("fsdp2", "lightning"),
    ("fsdp2-resumed", "lightning-2"),
    ("hf", "hf"),
    ("hf-resumed", "hf-2"),
]


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_two_ranks_train_as_one(ranks: Results, single: Results, name: str, alone: str) -> None:
    ours, theirs = ranks[name]["weights"], single[alone]["weights"]
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6


@pytest.mark.parametrize("name", [name for name, _ in PAIRS])
def test_what_a_plan_learns_is_the_same_on_all_ranks(ranks: Results, name: str) -> None:
    first, second = ranks[name]["vectors"]
    assert torch.equal(first, second) and (first[0] - vector()).abs().max() > 0.01


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_counts_are_sums_over_ranks_and_are_restored_once(ranks: Results, single: Results, name: str, alone: str) -> None:
    epochs = 1 if name in ("ddp", "fsdp2", "hf") else 2
    assert ranks[name]["local tokens"] == [(RESPONSE - (STEP if epochs == 1 else 0)) // 2] * 2  # step 0 has strength 0
    for state in (*ranks[name]["states"], *single[alone]["states"]):
        assert int(state[TOKEN_KEY]) == epochs * RESPONSE - STEP
        assert int(state["step"]) == epochs * ROWS // 4


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_every_rank_reports_what_one_process_would(ranks: Results, single: Results, name: str, alone: str) -> None:
    first, second = ranks[name]["metrics"]
    drift = {key: value for key, value in first.items() if key.startswith(("drift", "steer"))}
    assert f"{TRAIT}/effect_sd" in drift and drift == {key: second[key] for key in drift}
    (expected,) = single[alone]["metrics"]
    assert drift == pytest.approx({key: expected[key] for key in drift}, abs=1e-4)


@pytest.mark.parametrize(("store", "alone"), [("ddp", "lightning-2"), ("fsdp2", "lightning-2"), ("whole", "lightning-2"), ("hf", "hf")])
def test_records_of_two_ranks_are_those_of_one(folder: Path, single: Results, store: str, alone: str) -> None:
    assert_close_records(records(folder / f"{store}.sqlite"), records(single["folder"]["path"] / f"{alone}.sqlite"))


def test_a_resumed_run_of_two_ranks_equals_the_uninterrupted_one(ranks: Results, folder: Path) -> None:
    resumed, uninterrupted = ranks["ddp-resumed"], ranks["ddp-whole"]
    assert all(torch.equal(resumed["weights"][key], uninterrupted["weights"][key]) for key in uninterrupted["weights"])
    for ours, theirs in zip(resumed["states"], uninterrupted["states"], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = records(folder / "ddp.sqlite"), records(folder / "whole.sqlite")
    assert [astuple(record) for record in ours if record.mode == "probe"] == [
        astuple(record) for record in theirs if record.mode == "probe"
    ]
    # the window that was open at the checkpoint was added up in another order, which moves the last bit
    assert [record.mean for record in ours] == pytest.approx([record.mean for record in theirs], rel=1e-12)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ddp-resumed"])
def test_strengths_are_the_same_on_all_ranks_and_only_the_first_writes(ranks: Results, name: str) -> None:
    first, second = ranks[name]["seen"]
    start = 4 if name == "ddp-resumed" else 0
    assert first["strengths"] == second["strengths"] == [step / 8 for step in range(start, start + 4)]
    assert (first["writes"], second["writes"]) == (True, False)
