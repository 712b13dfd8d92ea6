"""Evaluation of edits: what is measured before, after and at the end, on weights that are then as they were; numbers by hand; files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edits.edit_helpers import equal_weights, random_delta, running_text, weights_of

from steer.edits import (
    Contexts,
    Covariance,
    Edit,
    EditedWeights,
    EditEvaluation,
    Fact,
    FactRecord,
    Guards,
    ValueSettings,
    ValueStore,
    evaluate_edits,
    readings_before,
)
from steer.edits.editors.memit import MEMIT
from steer.edits.evaluation import EditRow, comparison_cells
from steer.edits.make_edit import make_edit
from steer.edits.measure import measures_of
from steer.edits.readings import EditReader
from steer.errors import ConfigError, DamagedFileError, EditError, WrongKindError
from steer.model.estimates import Bootstrap

WORDS = ("cat", "dog", "tree")
RECORDS = [
    FactRecord(
        Fact(f"the {word} is a", word, "mat", "house", name=word),
        paraphrases=(f"my {word} is", f"one . the {word} is"),
        neighbours=("the sun is a", "the moon is a", f"the {other} is a"),
    )
    for word, other in zip(WORDS, (*WORDS[1:], "star"), strict=True)
]
NEUTRAL = ["the sun is warm and the water is cold .", "you and i like this song ."]
QUIET: dict[str, Any] = {"progress": False}


def shifted(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Edit:
    """Random deltas, other ones for other facts."""
    deltas = [random_delta(model, "model.layers.1.mlp.down_proj", 1, seed=len(facts[0].subject) + len(facts), size=0.3)]
    return make_edit(model, facts, deltas, editor="shifted")


def read(model: Any, tokenizer: Any, record: FactRecord) -> dict[str, float]:
    reader = EditReader(model, tokenizer, measures_of(None), progress=False)
    return reader.values(record, reader.read([record]), readings_before(model, tokenizer, [record], progress=False))


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")


def test_one_at_a_time(model: Any, tiny_tokenizer: Any) -> None:
    weights = weights_of(model)
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, shifted, neutral=NEUTRAL, **QUIET)
    assert equal_weights(model, weights) and not EditedWeights.of(model).applied
    assert (found.mode, found.editor, len(found)) == ("single", "shifted", 3)
    for row, record in zip(found.rows, RECORDS, strict=True):
        assert row.before == pytest.approx(read(model, tiny_tokenizer, record), abs=1e-5)
        with shifted(model, tiny_tokenizer, [record.fact]).applied(model):
            assert row.after == pytest.approx(read(model, tiny_tokenizer, record), abs=1e-5)
        assert row.after != row.before and row.final is None and row.neutral is not None and row.change > 0 and row.seconds > 0
    assert found.neutral is None and found.retained() is None and found["efficacy"].after.n == 3
    assert "not available" in str(found) and "3 facts, single" in str(found)


def test_a_batch_is_one_edit_without_neighbours_that_it_changes(model: Any, tiny_tokenizer: Any) -> None:
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, shifted, mode="batch", neutral=NEUTRAL, **QUIET)
    edit = shifted(model, tiny_tokenizer, [record.fact for record in RECORDS])
    made = evaluate_edits(model, tiny_tokenizer, RECORDS, edit, mode="batch", neutral=NEUTRAL, **QUIET)
    assert [row.after for row in found.rows] == [row.after for row in made.rows] and found.neutral == made.neutral
    assert found.facts["neighbours_left_out"] == 2 and found.neutral["value"] != 0
    assert found.neutral_per_edit().value == pytest.approx(found.neutral["value"] / 3)
    with edit.applied(model):
        assert found.rows[2].after == pytest.approx(read(model, tiny_tokenizer, RECORDS[2]), abs=1e-5)
    with pytest.raises(ConfigError, match="made already"):
        evaluate_edits(model, tiny_tokenizer, RECORDS, edit, **QUIET)


def test_a_sequence_is_measured_again_at_its_end(model: Any, tiny_tokenizer: Any) -> None:
    weights = weights_of(model)
    other = make_edit(model, [RECORDS[0].fact], [random_delta(model, "model.layers.0.mlp.down_proj", 0)], editor="other", name="there")
    edited = EditedWeights.of(model)
    edited.apply(other)
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, shifted, mode="sequence", **QUIET)
    assert [edit.name for edit in edited.applied] == ["there"], "an edit that was there stays, those of the sequence go"
    on = [shifted(model, tiny_tokenizer, [record.fact]) for record in RECORDS]
    for number, edit in enumerate(on):
        edited.apply(edit.named(str(number)))
        alone = FactRecord(RECORDS[number].fact, RECORDS[number].paraphrases)
        expected = read(model, tiny_tokenizer, alone)
        assert {name: found.rows[number].after[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    expected = read(model, tiny_tokenizer, FactRecord(RECORDS[0].fact, RECORDS[0].paraphrases))
    assert {name: found.rows[0].final[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found.rows[0].final != found.rows[0].after and found.rows[2].final == pytest.approx(found.rows[2].after, abs=1e-5)
    edited.clear()
    assert equal_weights(model, weights)


@pytest.mark.parametrize("mode", ["single", "sequence"])
def test_a_stopped_evaluation_goes_on_where_it_was(model: Any, tiny_tokenizer: Any, tmp_path: Path, mode: str) -> None:
    weights, calls = weights_of(model), []

    def stopping(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Edit:
        calls.append(facts[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return shifted(model, tokenizer, facts)

    options: dict[str, Any] = {"mode": mode, "neutral": NEUTRAL, "folder": tmp_path / "rows", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        evaluate_edits(model, tiny_tokenizer, RECORDS, stopping, **options)
    assert equal_weights(model, weights)
    with (tmp_path / "rows" / "rows.jsonl").open("a") as file:
        file.write('{"name": "tree", "prompt": "cut o')
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, stopping, **options)
    assert calls == ["cat", "dog", "tree", "tree"] and equal_weights(model, weights)
    whole = evaluate_edits(model, tiny_tokenizer, RECORDS, shifted, mode=mode, neutral=NEUTRAL, **QUIET)
    for row, expected in zip(found.rows, whole.rows, strict=True):
        assert row.after == expected.after and row.final == expected.final and row.neutral == expected.neutral
    with pytest.raises(ConfigError, match="rows of another evaluation"):
        evaluate_edits(model, tiny_tokenizer, RECORDS[:2], stopping, **options)


def test_a_fact_that_cannot_be_edited_counts_as_unchanged(model: Any, tiny_tokenizer: Any) -> None:
    def refusing(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Edit:
        if facts[0].subject == "dog":
            raise EditError("this dog stays", expected="a cat", found="a dog", remedy="leave it")
        return shifted(model, tokenizer, facts)

    for mode in ("single", "sequence"):
        found = evaluate_edits(model, tiny_tokenizer, RECORDS, refusing, mode=mode, **QUIET)
        assert found.problems() == {"dog": "this dog stays"} and found.rows[1].after == found.rows[1].before
        assert "1 could not be edited" in str(found)
    with pytest.raises(EditError, match="this dog stays"):
        evaluate_edits(model, tiny_tokenizer, RECORDS[1:], refusing, mode="batch", **QUIET)


@pytest.mark.parametrize("mode", ["single", "sequence"])
def test_facts_of_one_name_are_two_facts(model: Any, tiny_tokenizer: Any, tmp_path: Path, mode: str) -> None:
    twins = [replace(record, fact=replace(record.fact, name="1")) for record in (*RECORDS[:2], RECORDS[0])]
    options: dict[str, Any] = {"mode": mode, **QUIET}
    kept = evaluate_edits(model, tiny_tokenizer, twins, shifted, folder=tmp_path / "rows", **options)
    again = evaluate_edits(model, tiny_tokenizer, twins, shifted, folder=tmp_path / "rows", **options)
    assert [row.prompt for row in kept.rows] == [record.fact.prompt for record in twins] and kept.rows == again.rows
    assert mode == "single" or len(list((tmp_path / "rows" / "edits").iterdir())) == 3


@pytest.mark.parametrize("size", [1e3, 1e17], ids=["no finite weights", "no finite logits"])
@pytest.mark.parametrize("mode", ["single", "sequence"])
def test_an_edit_that_breaks_the_model_is_taken_out_and_has_done_nothing(
    tiny: Any, tiny_tokenizer: Any, tmp_path: Path, mode: str, size: float
) -> None:
    model = tiny("llama").half() if size == 1e3 else tiny("gpt2")
    path = "model.layers.1.mlp.down_proj" if size == 1e3 else "transformer.h.1.mlp.c_proj"

    def breaking(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Edit:
        deltas = [random_delta(model, path, 1, size=size if facts[0].subject == "dog" else 0.1)]
        return make_edit(model, facts, deltas, editor="breaking")

    weights = weights_of(model)
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, breaking, mode=mode, folder=tmp_path / "rows", **QUIET)
    assert list(found.problems()) == ["dog"] and equal_weights(model, weights)
    assert found.rows[1].after["neighbourhood"] == 0 and found.rows[1].before["neighbourhood"] > 0
    assert "efficacy_magnitude" not in found.rows[1].after and found.rows[2].after["efficacy_probability"] > 0
    assert evaluate_edits(model, tiny_tokenizer, RECORDS, breaking, mode=mode, folder=tmp_path / "rows", **QUIET).rows == found.rows


def test_a_folder_belongs_to_all_that_rows_depend_on(tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, facts = tiny("llama"), [record.fact for record in RECORDS]
    fast = MEMIT(value_settings=ValueSettings(steps=1))
    texts = running_text(20)
    options: dict[str, Any] = {
        "layers": [0], "covariance": Covariance.fit(model, tiny_tokenizer, texts, [0], folder=tmp_path / "c"), "guards": Guards(),
        "contexts": Contexts(("the sun is warm",)), "neutral": NEUTRAL, "folder": tmp_path / "rows", **QUIET,
    }  # fmt: skip
    first = evaluate_edits(model, tiny_tokenizer, facts, fast, **options)
    assert evaluate_edits(model, tiny_tokenizer, facts, fast, values=ValueStore(), **options).rows == first.rows
    other_texts = Covariance.fit(model, tiny_tokenizer, texts[1:], [0], folder=tmp_path / "c")
    others = {"contexts": Contexts(("the moon is cold",)), "guards": Guards(drift=0.1), "neutral": NEUTRAL[::-1], "covariance": other_texts}
    for changed in ({name: value} for name, value in others.items()):
        with pytest.raises(ConfigError, match="rows of another evaluation"):
            evaluate_edits(model, tiny_tokenizer, facts, fast, **{**options, **changed})
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="rows of another evaluation"):
        evaluate_edits(model, tiny_tokenizer, facts, fast, **options)


def test_what_was_read_before_is_shared_between_editors(model: Any, tiny_tokenizer: Any) -> None:
    before = readings_before(model, tiny_tokenizer, RECORDS, measures="all", progress=False)
    found = evaluate_edits(model, tiny_tokenizer, RECORDS, shifted, before=before, measures="all", **QUIET)
    for row in found.rows:
        assert row.written["before"] == before.greedy[row.prompt] and "after" in row.written
    assert found["fluency"].after.value > 0 and found["consistency"].after is None
    cells = comparison_cells([found, found])
    assert [row[0] for row in cells] == ["editor", "none", "shifted", "shifted"] and len({len(row) for row in cells}) == 1


def test_refusals(model: Any, tiny_tokenizer: Any) -> None:
    others: list[dict[str, Any]] = [{"mode": "twice"}, {"measures": ["nonsense"]}, {"edit": 3}, {"edit": "no_such_editor"}]
    for wrong in (*others, {"records": []}, {"records": ["the cat"]}):
        given: dict[str, Any] = {"records": RECORDS, "edit": shifted, **wrong}
        with pytest.raises(ConfigError):
            evaluate_edits(model, tiny_tokenizer, given.pop("records"), given.pop("edit"), **given, **QUIET)
    with pytest.raises(ConfigError, match="wrong type for what an editing function gives"):
        evaluate_edits(model, tiny_tokenizer, RECORDS, lambda model, tokenizer, facts: None, **QUIET)


# ---- numbers


def row(name: str, es: float, ps: float, ns: float, ns_before: float, final: float | None = None, **more: Any) -> EditRow:
    scores = {"efficacy": es, "paraphrase": ps, "neighbourhood": ns}
    last = None if final is None else {**scores, "efficacy": final}
    return EditRow(name, "p", "s", "t", "u", {"efficacy": 0.0, "paraphrase": 0.0, "neighbourhood": ns_before}, scores, last, **more)


def evaluation(*rows: EditRow, mode: str = "single", neutral: Any = None) -> EditEvaluation:
    return EditEvaluation(mode, "e", ("efficacy", "paraphrase", "neighbourhood"), rows, neutral)


def test_numbers_made_of_several_columns() -> None:
    first = row("a", 1.0, 0.5, 0.8, 1.0, 1.0, neutral=0.1, seconds=2.0)
    second = row("b", 1.0, 0.5, 0.4, 0.5, 0.0, neutral=0.3, seconds=4.0)
    found = evaluation(first, second, mode="sequence")
    assert found.score().value == pytest.approx(100 * 3 / (1 / 1.0 + 1 / 0.5 + 1 / 0.6)) and found.score("before").value == 0
    assert found.kept().value == pytest.approx(100 * 0.6 / 0.75) and found.retained().value == 50
    assert found.neutral_per_edit().value == pytest.approx(0.2) and found.seconds_per_edit() == 3
    assert found["efficacy"].after.value == 100 and found["efficacy"].final.value == 50
    assert (found["efficacy"].after.low, found["efficacy"].after.high) == (100, 100)
    assert found["paraphrase_accuracy"].after is None
    refused = evaluation(replace(first, problem="no edit"), replace(second, problem="none"), mode="sequence")
    assert refused.retained() is None
    never_worked = evaluation(row("a", 0.0, 0.5, 0.8, 0.0, 1.0), mode="sequence")
    assert never_worked.retained() is None and never_worked.kept() is None and never_worked.score().value == 0
    with pytest.raises(ConfigError, match="did you mean 'efficacy'"):
        found["eficacy"]


def test_intervals_of_what_is_made_of_several_columns_are_paired_over_facts() -> None:
    """A hundred facts whose neighbours differ much from each other and little from before to after."""
    chance = torch.Generator().manual_seed(0)
    before = torch.rand(100, generator=chance, dtype=torch.float64)
    rows = [row(str(i), float(i % 2), 1.0, 0.9 * float(b), float(b), float(i % 4 == 1)) for i, b in enumerate(before)]
    found, other = evaluation(*rows, mode="sequence"), evaluation(*(replace(each, after=each.before) for each in rows), mode="sequence")
    kept = found.kept()
    assert kept.value == pytest.approx(90) and kept.low == pytest.approx(90) and kept.high == pytest.approx(90)
    assert found["neighbourhood"].after.high - found["neighbourhood"].after.low > 5
    retained = found.retained()
    assert retained.value == pytest.approx(50) and (retained.low, retained.high) == pytest.approx((36, 64), abs=3) and retained.n == 50
    fewer = found.difference(other, "neighbourhood")
    half = 1.96 * float((0.1 * 100 * before).std()) / 10
    assert fewer.value == pytest.approx(-10 * float(before.mean())) and (fewer.high - fewer.low) / 2 == pytest.approx(half, rel=0.15)
    assert found.difference(found, "efficacy", "final").value == 0
    with pytest.raises(ConfigError, match="cannot be paired"):
        found.difference(evaluation(*rows[1:]), "efficacy")
    score = found.score()
    alone = [evaluation(*rows[i::2]).score().value for i in range(2)]
    assert score.low < score.value < score.high and alone[0] == 0 < score.value


def test_bootstrap_intervals_cover_the_mean_and_know_of_missing_values() -> None:
    chance = torch.Generator().manual_seed(0)
    covered = 0
    for number in range(100):
        values = torch.randn(40, generator=chance, dtype=torch.float64).tolist()
        found = Bootstrap(40, seed=number).mean(values)
        assert found.low < found.value < found.high
        covered += found.low < 0 < found.high
    assert 88 <= covered <= 99
    some = Bootstrap(4).mean([1.0, None, 3.0, None])
    assert (some.value, some.n) == (2.0, 2) and some.low >= 1 and some.high <= 3
    assert Bootstrap(2).mean([None, None]) is None and Bootstrap(0).mean([]) is None and Bootstrap(1).mean([2.0]).low is None


def test_an_evaluation_is_saved_and_read(tmp_path: Path) -> None:
    rows = row("a", 1.0, 0.5, 0.8, 1.0, 1.0), row("b", 0.0, 0.5, 0.4, 0.5, 0.0)
    found = evaluation(*rows, mode="sequence", neutral={"value": 0.2, "before": 1.0})
    file = found.save(tmp_path / "deep" / "evaluation.json")
    again = EditEvaluation.load(file)
    assert again.rows == found.rows and str(again) == str(found) and again.neutral == found.neutral
    content = json.loads(file.read_text())
    assert content["summary"]["efficacy"]["final"]["value"] == 50 and content["made_of_several"]["retained"]["value"] == 100
    content["rows"][0]["after"]["efficacy"] = 0.0
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError):
        EditEvaluation.load(file)
    file.write_text('{"kind": "lock"}')
    with pytest.raises(WrongKindError, match="no evaluation of edits"):
        EditEvaluation.load(file)
