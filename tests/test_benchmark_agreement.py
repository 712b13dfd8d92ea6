"""benchmarks/agreement.py: the programs that are installed here, and what it makes of answers of those that are not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

import steer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("agreement")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def own(agreement, tmp_path, monkeypatch):
    """steer's side on a tiny model."""
    monkeypatch.setattr(agreement.steer, "load", lambda name: (FAMILIES["llama"](), tiny_tokenizer()))
    monkeypatch.setattr(agreement, "texts", lambda: [("the cat is on the mat", "a dog ran in the house"), ("warm food", "cold water")] * 4)
    monkeypatch.setattr(agreement, "CONTINUATIONS", [("the cat", " sat on the mat"), ("a big dog ran", " in")])
    return agreement.Own(tmp_path)


@pytest.mark.parametrize("program", ["accelerate", "lightning-fabric", "peft"])
def test_programs_that_run_steer_agree_with_a_hook(agreement, program):
    _, compare = agreement.INSIDE[program]
    rows = [agreement.row_of(program, compared) for compared in compare(tiny_tokenizer(), FAMILIES["llama"]())]
    assert rows and all(row.ok for row in rows), rows


@pytest.mark.parametrize("name", ["prompts and completions", "evaluation, packed"])
def test_a_trl_trainer_agrees_with_a_hook(agreement, name):
    inside = importlib.import_module("agreement_inside")
    with_plan, by_hand, plain = (inside.sft(tiny_tokenizer(), inside.MODES[name], way) for way in ("plan", "hand", "none"))
    assert agreement.row_of("trl", inside.Comparison(name, with_plan, by_hand, plain)).ok
    assert len(with_plan) - len(inside.weights(inside.tiny_llama(tiny_tokenizer()))) >= inside.STEPS + ("evaluation" in name)


def test_what_does_not_agree_or_says_nothing_is_no_agreement(agreement):
    def row(ours, theirs, plain=0.0):
        return agreement.row_of("one", agreement.Comparison("x", *(torch.tensor([value]) for value in (ours, theirs, plain))))

    assert row(1.0, 1.0).ok and not row(1.0, 1.001).ok
    assert not row(1.0, 1.0, plain=1.0).ok  # steering changed nothing
    assert not row(float("nan"), 1.0).ok
    with pytest.raises(ValueError, match="different shapes"):
        agreement.row_of("one", agreement.Comparison("x", torch.zeros(2), torch.zeros(2), torch.zeros(1, 2)))


@pytest.mark.parametrize("program", ["steering-vectors", "repeng", "lm-eval"])
def test_every_check_takes_the_answer_that_a_hook_gives(agreement, own, program, tmp_path):
    """An arm with steer in the place of the program: its answers agree; without steering they do not."""
    worker = importlib.import_module("peers.worker")

    class Arm(type(own.arm)):
        def applied(self, setting):
            if "file" in setting:
                return own.steered([own.middle], 1.0).attached(self.model)
            found = steer.import_directions(setting["control_vector"])
            return steer.Plan([steer.Intervention(steer.Add(one.vector), site) for site, one in found.items()]).attached(self.model)

        def extract(self, pairs, layers, batch):
            return super().extract(pairs, layers, batch, "pca" if program == "repeng" else "mean_difference")

        def loglikelihoods(self, texts):
            return own.loglikelihoods(None).tolist()  # in the context of `applied`

    checks = list(agreement.BESIDE[program](own))
    for check in checks:
        column = json.loads(json.dumps(check.column))
        job = {"pairs": own.pairs, "batch": 4}
        with torch.no_grad():
            worker.measure(Arm(own.model, own.tokenizer), column, job, own.vectors, tmp_path / "answer")
        answer = agreement.load_file(tmp_path / "answer")
        compared = check.compare(answer)
        assert agreement.row_of(program, compared).difference < 1e-5, compared.what
        assert agreement.row_of(program, check.compare({name: tensor + 1 for name, tensor in answer.items()})).difference > 0.01
    assert len(checks) == {"steering-vectors": 5, "repeng": 6, "lm-eval": 1}[program]


def test_a_program_that_cannot_be_tried_is_named_with_the_reason(agreement, own, monkeypatch, tmp_path):
    def no_room(*_):
        raise OSError("no room")
        yield

    monkeypatch.setitem(agreement.INSIDE, "peft", ((), no_room))
    rows, made_of, absent = agreement.tried(["peft", "repeng"], None)
    assert not rows and absent == {"peft": "OSError: no room", "repeng": "needs --environments"}

    def refused(*_):
        raise agreement.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(agreement, "environment", refused)
    assert agreement.tried(["llama-cpp"], tmp_path)[2]["llama-cpp"].startswith("pip could not install llama-cpp-cffi==")


def test_the_embedded_model_is_unpacked_into_a_file_that_reads_the_same(agreement, tmp_path, monkeypatch):
    from tiny_gguf import write_tiny_gguf

    place = tmp_path / "package"
    place.mkdir()
    source = write_tiny_gguf(place / agreement.embedded.GGUF)
    spec = type("Spec", (), {"submodule_search_locations": [str(place)]})
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: spec)
    written = agreement.unpacked(tmp_path / "unpacked.gguf")
    monkeypatch.undo()
    from gguf import GGUFReader

    before, after = GGUFReader(source), GGUFReader(written)
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    assert all((a.data == b.data).all() for a, b in zip(before.tensors, after.tensors, strict=True))
    fields = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    assert fields == {name: field.contents() for name, field in after.fields.items() if not name.startswith("GGUF.")}
