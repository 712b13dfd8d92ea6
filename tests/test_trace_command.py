"""`steer trace`: one fact on the command line, or a file of facts."""

import json

import pytest
from edits.tracing_helpers import FIRST, facts_of
from families import FAMILIES
from tiny_experiment import write_model

from steer.cli import main
from steer.edits import TraceResult


@pytest.fixture
def steer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_model(tmp_path / "model")

    def run(*arguments):
        capsys.readouterr()
        status = main(["trace", f"model.name={tmp_path / 'model'}", "samples=2", "window=2", *arguments])
        return status, *capsys.readouterr()

    return run


def test_one_fact_whose_answer_is_what_the_model_says(steer, tmp_path):
    status, out, _ = steer('prompt="{} dog sat on the"', f"subject={FIRST[1]}", "folder=out")
    assert status == 0 and "causal trace of 1 fact, noise of 3 deviations" in out and "probability of the answer" in out
    assert "logit difference of the answer" in out and "2301.04213" in out and "trace in out" in out
    found = TraceResult.load(tmp_path / "out" / "trace.safetensors")
    assert found[0].fact.prompt == FIRST[0] and found.kinds == ("hidden", "mlp", "attn") and found.about["samples"] == 2
    assert "<h1>Causal trace: red cat dog sat on the</h1>" in (tmp_path / "out" / "trace.html").read_text()


def test_a_file_of_facts(steer, tmp_path):
    facts = facts_of(FAMILIES["llama"]())
    rows = [{"prompt": fact.prompt, "subject": fact.subject, "attribute": fact.target} for fact in facts]
    (tmp_path / "known.json").write_text(json.dumps([{**rows[0], "attribute": "please"}, *rows]))
    status, out, _ = steer("facts=known.json", "kinds=[hidden]", "severed=mlp", "count=1", "settings.deviations=2", "folder=out")
    assert status == 0 and "noise of 2 deviations" in out and "mlp severed at the restored token" in out
    found = TraceResult.load(tmp_path / "out" / "trace.safetensors")
    assert [trace.fact.prompt for trace in found] == [FIRST[0]] and found.left_out[0].fact.target == "please"


def test_a_replacement(steer, tmp_path):
    one = (f"prompt={FIRST[0]}", f"subject={FIRST[1]}")
    assert steer(*one, "corruption=replacement", "replacement=bad dog", "kinds=[hidden]", "folder=out")[0] == 0
    assert TraceResult.load(tmp_path / "out" / "trace.safetensors")[0].corruption == {"replaced_by": "bad dog"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to trace"),
        (("prompt=red cat sat on",), "prompt and subject, or facts"),
        (("prompt=red cat sat on", "subject=cat", "facts=known.json"), "leave one out"),
        (("prompt=red cat sat on", "subject=tree"), "the subject 'tree' is not in its prompt"),
        (("prompt=red cat sat on", "subject=cat", "target=please"), "none of the facts can be traced"),
        (("prompt=red cat sat on", "subject=cat", "kinds=[hiden]"), "did you mean 'hidden'"),
        (("prompt=red cat sat on", "subject=cat", "window=0"), "the window of causal tracing"),
        (("prompt=red cat sat on", "subject=cat", "drawn=-1"), "`drawn`"),
        (("prompt=red cat sat on", "subject=cat", "measure=logits"), "the measure of a trace"),
        (("prompt=red cat sat on", "subject=cat", "corruption=replacement", "kinds=[hidden]"), "replacement=... of 'steer trace'"),
        (("prompt=red cat sat on", "subject=cat", "settings.sigma=2"), "cannot be made with these settings"),
        (("facts=absent.json",), "absent.json"),
    ],
)
def test_errors_are_printed_without_a_traceback(steer, arguments, words):
    status, _, err = steer(*arguments)
    assert status == 2 and words in err and "Traceback" not in err
