"""benchmarks/causal_tracing.py: a dry run on a tiny model, and what it makes of what it measured."""

import importlib
import json
from pathlib import Path

import pytest
from edits.tracing_helpers import facts_of
from families import FAMILIES
from tiny_experiment import write_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("causal_tracing")
    facts = facts_of(FAMILIES["llama"]())
    rows = [{"prompt": fact.prompt, "subject": fact.subject, "attribute": fact.target} for fact in [*facts, facts[0].with_target("please")]]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    given = ["--facts", tmp_path / "facts.json", "--model", write_model(tmp_path / "model"), "--first", 1, "--plain", 2, "--samples", 2]
    found = benchmark.main([*map(str, given), "--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [(fact["tokens"], fact["before_the_subject"], fact["cells"]) for fact in found["facts"]] == [(6, 0, 54), (10, 3, 90)]
    assert [fact["plain_cells_run"] for fact in found["facts"]] == [12, 14] and found["probability_apart"] < 1e-6
    share = found["share_subject_first"]
    faster = found["faster"]
    assert share == pytest.approx(2 / 3)
    assert 1 / faster["mix"] == pytest.approx(share / faster["subject first"] + (1 - share) / faster["subject later"])
