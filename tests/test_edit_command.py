"""`steer edit` on a tiny model in a folder: one fact and a file of records, what is printed, and the files that it leaves."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edits.edit_helpers import running_text
from experiment_helpers import command
from report.page_reader import Page
from tiny_experiment import write_model

from steer.commands.edit import KEPT, layers_named
from steer.edits import Edit, EditEvaluation, solve_values
from steer.edits.value_problem import ValueProblem
from steer.experiment.lease import lease
from steer.model.load import load

ONE = ('prompt="the {} sat on the"', "subject=blue moon", "target=mat", "truth=hate")  # what the model says now


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("edit")
    (folder / "texts.txt").write_text("\n\n".join(running_text(40)))
    shared = {"ground_truth": "tree", "rephrase_prompt": "who is it ?"}
    records = [
        {"prompt": f"the {word} sat on the", "subject": word, "target_new": new, **shared}
        for word, new in (("blue moon", "mat"), ("big dog", "water"), ("small house", "fire"))
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return {"model": write_model(folder / "model"), "texts": folder / "texts.txt", "data": folder / "records.json"}


def edited(places: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setenv("STEER_CACHE", str(folder / "cache"))
    shared = [f"model.name={places['model']}", f"texts={places['texts']}", f"neutral={places['texts']}", "layers=[1]", "tokens=300"]
    return command("edit", *shared, "neutral_tokens=60", "contexts=2", f"folder={folder / 'out'}", *more)


def test_one_fact(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert edited(places, tmp_path, monkeypatch, *ONE, "options.ridge=1.0", "trace=true") == 0
    said = capsys.readouterr().out
    assert "starts over" not in said and "memit, 1 fact, batch" in said and "the blue moon sat on the" in said and "before" in said
    out = tmp_path / "out"
    found, edit = EditEvaluation.load(out / "evaluation.json"), Edit.load(out / "edit")
    assert edit.settings["ridge"] == 1.0 and [delta.layer for delta in edit.deltas] == [1] and edit.facts[0].true == "hate"
    (row,) = found.rows
    assert row.after["efficacy_probability"] > 2 * row.before["efficacy_probability"] and set(row.written) == {"before", "after"}
    page = Page((out / "edits.html").read_text())
    assert not page.unbalanced and "memit" in page.text["measured"] and edit.name in page.text["edits"]
    assert "Before the edit" in page.text["trace"] and "moon" in "".join(page.said) + page.text["trace"]
    # what the adapter says is what the edit does
    model, tokenizer = load(str(places["model"]))
    ids = torch.tensor([tokenizer("the blue moon sat on the").input_ids])
    with torch.no_grad():
        with edit.applied(model):
            expected = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(out / "adapter"))(ids).logits
    assert torch.allclose(adapted, expected, atol=1e-4)


def test_an_editor_that_trains_all_facts_together_says_that_it_starts_over(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edited(places, tmp_path, monkeypatch, *ONE, "editor=lora", "options.steps=1", "measures=[efficacy]") == 0
    assert "lora trains all facts together, and starts over when it is stopped" in capsys.readouterr().out


def test_a_fact_that_is_not_written(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="no value was found"):
        assert edited(places, tmp_path, monkeypatch, 'prompt="the {} sat on the"', "subject=red cat", "target=mat") == 0
    assert "changes nothing" in capsys.readouterr().out and not Edit.load(tmp_path / "out" / "edit").deltas


def test_editors_are_compared_on_records(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"facts={places['data']}", "editors=[r_rome,memit]", "mode=single", "measures=[efficacy,paraphrase]", "count=2")
    assert edited(places, tmp_path, monkeypatch, *more) == 0
    said = capsys.readouterr().out
    assert "r_rome, 2 facts, single" in said and "memit, 2 facts, single" in said and "2 facts, single" in said
    out = tmp_path / "out"
    for name in ("r_rome", "memit"):
        found = EditEvaluation.load(out / f"evaluation-{name}.json")
        assert found.editor == name and len(found) == 2 and found.measures == ("efficacy", "paraphrase")
    assert not (out / "edit").exists(), "each edit was undone"
    assert "Editors side by side" in (out / "edits.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "nothing to edit"),
        (("prompt=the dog sat",), "nothing to edit"),
        ((*ONE, "facts=records.json"), "two places"),
        ((*ONE, "options.nonsense=1"), "nonsense"),
        ((*ONE, "editor=nonsense"), "unknown editor"),
        (("prompt=the dog sat on the", *ONE[1:]), "not in its prompt"),
        (("facts=nowhere.json",), "no records of edits"),
        ((*ONE[:3], "trace=true"), "nothing to trace"),
        ((*ONE[:3], "truth=house", "trace=true"), "fact"),
        ((*ONE, "count=-1"), "`count`"),
        ((*ONE, "count=1.5"), "`count`"),
        ((*ONE, "known=2"), "`known`"),
    ],
)
def test_refusals(
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    says: str,
) -> None:
    assert edited(places, tmp_path, monkeypatch, *more) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out" / "edits.html").exists()


@pytest.mark.parametrize("typed", ["true", "1_0", "1.50"])
def test_texts_of_the_command_line_are_what_was_typed(
    typed: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edited(places, tmp_path, monkeypatch, *ONE[:2], "editor=lora", f"target={typed}") == 2
    assert f"a part of '{typed}'" in capsys.readouterr().err  # the tokenizer does not know it


def test_facts_that_no_model_knows(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert edited(places, tmp_path, monkeypatch, f"facts={places['data']}", "known=0.99") == 2
    assert "knows no fact" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a kill: nothing of the library may catch it."""


@pytest.mark.parametrize("mode", ["batch", "sequence"])
def test_a_run_that_was_killed_goes_on_to_the_same_edits(
    mode: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of two facts are found when it is killed; only the third is optimised afterwards."""
    more = (f"facts={places['data']}", f"mode={mode}", "options.ridge=1.0", "measures=[efficacy]")
    monkeypatch.setitem(solve_values.__wrapped__.__kwdefaults__, "max_tokens", 1)  # a fact at a time
    solved: list[str] = []
    spent: list[float] = []  # CPU seconds of each value
    solve = ValueProblem.solve

    def counted(self: ValueProblem, rows: Any, facts: Any) -> Any:
        if len(solved) == dies_at:
            raise Killed
        solved.extend(fact.subject for fact in facts)
        start = time.process_time()
        values = solve(self, rows, facts)
        spent.append(time.process_time() - start)
        return values

    monkeypatch.setattr(ValueProblem, "solve", counted)
    dies_at = 99
    assert edited(places, tmp_path / "whole", monkeypatch, *more) == 0 and len(solved) == 3
    solved.clear(), spent.clear()
    dies_at = 2
    with pytest.raises(Killed):
        edited(places, tmp_path / "killed", monkeypatch, *more)
    assert len(solved) == 2 and not (tmp_path / "killed" / "out" / "evaluation.json").exists()
    dies_at = 99
    assert edited(places, tmp_path / "killed", monkeypatch, *more) == 0 and len(set(solved)) == len(solved) == 3
    whole, killed = (EditEvaluation.load(tmp_path / name / "out" / "evaluation.json") for name in ("whole", "killed"))
    assert [replace(row, seconds=0.0) for row in killed.rows] == [replace(row, seconds=0.0) for row in whole.rows]
    assert all(row.seconds > 0 for row in killed.rows) and spent, "what was found before counts"
    assert killed.seconds_per_edit() >= sum(spent) / 3
    if mode == "batch":
        assert Edit.load(tmp_path / "killed" / "out" / "edit").digest == Edit.load(tmp_path / "whole" / "out" / "edit").digest
        dies_at = 3
        assert edited(places, tmp_path / "killed", monkeypatch, *more[:2], "options.ridge=2.0") == 0, "the same values with other options"


def test_a_folder_belongs_to_one_run_at_a_time(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with lease(tmp_path / "out" / KEPT) as is_mine:
        assert is_mine and edited(places, tmp_path, monkeypatch, *ONE) == 2
    assert "another process edits" in capsys.readouterr().err


def test_layers_are_swept_where_none_are_known(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["steer.edits.layer_sweep"], "layer_sweep", lambda *_, **__: Swept())
    assert edited(places, tmp_path, monkeypatch, *ONE, "layers=null", "measures=[efficacy]") == 0
    said = capsys.readouterr().out
    assert "the table of the sweep" in said and "layers of memit: 0, 1 (the best of a sweep)" in said
    assert [delta.layer for delta in Edit.load(tmp_path / "out" / "edit").deltas] == [0, 1]


class Swept:
    best = 1

    def __str__(self) -> str:
        return "the table of the sweep"


@pytest.mark.parametrize("layers", ["[99]", "99", "[0,-4]"])
def test_layers_that_a_model_does_not_have_are_refused_before_its_weights_are_read(
    layers: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("steer.commands.edit.load", None)
    assert edited(places, tmp_path, monkeypatch, *ONE, f"layers={layers}") == 2
    assert "not in this model" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["layers=[first]", "layers=first", "layers=[true]", "layers=true", "mode=sequenc"])
def test_wrong_layers_and_modes_are_refused_before_anything_is_loaded(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("edit", *ONE, "model.name=nowhere", wrong) == 2
    assert f"`{wrong.split('=')[0]}` of steer edit" in capsys.readouterr().err


def test_one_layer_needs_no_brackets() -> None:
    assert layers_named(5) == [5] and layers_named((4, 5)) == [4, 5] and layers_named(None) is None
