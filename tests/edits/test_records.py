"""Records of edits: every form is told by its keys and read, what is missing is refused, and known facts are those that a model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.edits import Fact, FactRecord, Probe, known_facts, load_records
from steer.edits.record import without_edited_subjects
from steer.errors import ConfigError, DamagedFileError, FileError

FULL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is a",
        "relation_id": "P1",
        "subject": "the cat",
        "target_new": {"str": "dog", "id": "Q1"},
        "target_true": {"str": "tree", "id": "Q2"},
    },
    "paraphrase_prompts": ["my dog . the cat is", "one . the cat is"],
    "neighborhood_prompts": ["the house is a", "the mat is a"],
    "generation_prompts": ["the cat can"],
}
FLAT = [
    {
        "case_id": number,
        "prompt": f"the {subject} is a",
        "subject": subject,
        "target_new": "dog",
        "ground_truth": true,
        "rephrase_prompt": f"a {subject} is",
        "locality_prompt": f"your {near} is a",
        "locality_ground_truth": true,
    }
    for number, (subject, true, near) in enumerate(
        [("cat", "tree", "sun"), ("mat", "tree", "moon"), ("house", "tree", "cat"), ("star", "song", "sun")]
    )
]
ZSRE = {"subject": "cat", "src": "what is the cat ?", "alt": "a dog", "answers": ["a tree", "tree"], "rephrase": "what can the cat be ?",
        "loc": "who ran ?", "loc_ans": "the dog",
        "portability": {"Reasoning": [{"prompt": "the cat can", "ground_truth": [["run"]]}]}}  # fmt: skip
KNOWN = {"known_id": 3, "prompt": "the cat sat on the", "subject": "cat", "attribute": "mat", "template": "{} sat on the"}


def written(path: Path, content: Any, lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_counterfact_as_it_was_released(tmp_path: Path, lines: bool) -> None:
    (record,) = load_records(written(tmp_path / "records", [FULL], lines))
    assert record.fact == Fact("the cat is a", "the cat", "dog", "tree", "7")
    assert record.paraphrases == tuple(FULL["paraphrase_prompts"]) and record.neighbours == tuple(FULL["neighborhood_prompts"])
    assert record.generation_prompts == ("the cat can",) and (record.relation, record.target_id, record.true_id) == ("P1", "Q1", "Q2")
    assert FactRecord.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_texts_about_objects_and_subjects_come_from_the_snippets(tmp_path: Path) -> None:
    samples = [{"name": "a wolf", "text": "a wolf is a dog"}, {"name": "the cat", "text": "the cat ran"}]
    snippets = [
        {"relation_id": "P1", "target_id": "Q1", "samples": samples[:1]},
        {"relation_id": "P1", "target_id": "Q2", "samples": samples},
        {"relation_id": "P9", "target_id": "Q1", "samples": samples},
    ]
    source = written(tmp_path / "records.json", [FULL])
    (record,) = load_records(source, snippets=written(tmp_path / "snippets.json", snippets))
    assert record.reference_texts == ("a wolf is a dog",) and record.essence_texts == ("the cat ran",)
    with pytest.raises(DamagedFileError, match="samples"):
        load_records(source, snippets=written(tmp_path / "other.json", {"a": 1}))
    with pytest.raises(DamagedFileError, match="name and text|name"):
        load_records(source, snippets=written(tmp_path / "more.json", [{"samples": [{"text": "x"}]}]))


def test_records_of_the_flat_form_lend_one_another_neighbours(tmp_path: Path) -> None:
    records = load_records(written(tmp_path / "flat.json", FLAT))
    assert records[0].fact == Fact("the cat is a", "cat", "dog", "tree", "0") and records[0].paraphrases == ("a cat is",)
    # its own first, then those of the same template and object in the order of the file, none that name its own subject
    assert records[0].neighbours == ("your sun is a", "the mat is a", "your moon is a", "the house is a")
    assert records[3].neighbours == ("your sun is a",), "another object"


def test_ten_neighbours_at_most(tmp_path: Path) -> None:
    words = "mat house tree sun moon star day night food water fire earth".split()
    rows = [{**FLAT[0], "case_id": i, "prompt": f"the {word} is a", "subject": word} for i, word in enumerate(words)]
    assert [len(record.neighbours) for record in load_records(written(tmp_path / "flat.json", rows))] == [10] * 12


def test_an_answer_that_is_not_the_true_object_is_no_neighbour(tmp_path: Path) -> None:
    rows = [{**FLAT[0], "locality_ground_truth": "mat", "portability_prompt": ["the cat can"], "portability_ground_truth": ["run"]}]
    (record,) = load_records(written(tmp_path / "flat.json", rows))
    assert record.neighbours == () and record.locality == (Probe("your sun is a", "mat"),)
    assert record.portability == (Probe("the cat can", "run"),)


def test_facts_of_ones_own(tmp_path: Path) -> None:
    row = {"prompt": "the {} sat on the", "subject": "cat", "target": "mat", "true": "tree", "neighbours": ["the dog sat on the"]}
    full, short = load_records(written(tmp_path / "own.json", [row, {"prompt": "where is the dog", "subject": "dog", "target": "sun"}]))
    assert full == FactRecord(Fact.of("the {} sat on the", "cat", "mat", "tree"), neighbours=("the dog sat on the",))
    assert short == FactRecord(Fact("where is the dog", "dog", "sun"))
    with pytest.raises(DamagedFileError, match="record 1"):
        load_records(written(tmp_path / "wrong.json", [{**row, "true": 5}]))


def test_fields_that_nothing_reads_are_said(tmp_path: Path) -> None:
    row = {"prompt": "the {} sat on the", "subject": "cat", "target": "mat"}
    with pytest.warns(UserWarning, match=r"nothing reads: 'paraphrase' \(did you mean 'paraphrases'\?\), 'source'"):
        load_records(written(tmp_path / "own.json", [row, {**row, "subject": "dog", "paraphrase": ["a"], "source": 3}]))


def test_facts_that_cannot_be_edited_and_tables_are_no_damaged_files(tmp_path: Path) -> None:
    row = {"prompt": "the sun sat on the", "subject": "cat", "target": "mat"}
    with pytest.raises(DamagedFileError, match=r"no record of[\s\S]*look at their prompts"):
        load_records(written(tmp_path / "own.json", [row]))
    (tmp_path / "facts.csv").write_text("prompt,subject,target\n")
    with pytest.raises(ConfigError, match="not read from tables"):
        load_records(tmp_path / "facts.csv")


def test_zsre_and_known_facts(tmp_path: Path) -> None:
    (record,) = load_records(written(tmp_path / "zsre.json", [ZSRE]))
    assert record.fact.target == "a dog" and record.fact.true == "a tree" and record.paraphrases == ("what can the cat be ?",)
    assert record.locality == (Probe("who ran ?", "the dog"),) and record.portability == (Probe("the cat can", "run", "reasoning"),)
    (record,) = load_records(written(tmp_path / "known.json", [KNOWN]))
    assert record.fact == Fact("the cat sat on the", "cat", "mat", "mat", "3")


def test_rows_that_are_no_facts_are_left_out_aloud(tmp_path: Path) -> None:
    rows = [ZSRE, {**ZSRE, "src": "who is it ?"}, {**ZSRE, "alt": " "}]
    with pytest.warns(UserWarning, match="2 of 3 records"):
        assert len(load_records(written(tmp_path / "zsre.json", rows))) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"question": "who?", "answer": "me"}], "the keys question, answer"),
        ([["the cat", "dog"]], "list"),
        ([], "at least one"),
        ([{**FLAT[0], "prompt": ""}], "prompt"),
        ([{**FLAT[0], "rephrase_prompt": 3}], "rephrase_prompt"),
        ([{**FLAT[0], "locality_prompt": ["a", "b"]}], "2 prompts, 1 answers"),
        ([{**ZSRE, "portability": {"Reasoning": [{"prompt": "the cat can"}]}}], "ground_truth"),
        ([FLAT[0], {**FLAT[1], "case_id": 0}], "a number of its own"),
        ([{**FULL, "requested_rewrite": {"prompt": "{} is a", "subject": "cat"}}], "target_new"),
    ],
)
def test_other_content_is_refused_with_what_was_found(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(DamagedFileError, match=says):
        load_records(written(tmp_path / "records.json", content))


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, "none_of_these"):
        with pytest.raises(FileError, match="no records of edits"):
            load_records(path)
    with pytest.raises(ConfigError):
        load_records(3)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Table(list):
        features = dict.fromkeys(FULL)

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or Table([FULL]))
    assert load_records("counterfact") == load_records("someone/else")
    assert asked == [(("azhx/counterfact", None), {"split": "train"}), (("someone/else", None), {"split": "train"})]


def test_neighbours_that_are_edited_too_are_left_out() -> None:
    records = [
        FactRecord(Fact("the cat is a", "cat", "dog"), neighbours=("the mat is a", "the house is a", "the mattress is a")),
        FactRecord(Fact("the mat is a", "mat", "dog"), neighbours=("the house is a",)),
    ]
    kept, left_out = without_edited_subjects(records)
    assert kept[0].neighbours == ("the house is a", "the mattress is a") and kept[1].neighbours == ("the house is a",) and left_out == 1


def test_known_facts_are_said_first_and_surely(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    texts = ["the cat sat on the", "my dog ran in the", "a tree is", "one two three"]
    with torch.no_grad():
        said = [model(torch.tensor([tiny_tokenizer(text).input_ids])).logits[0, -1].softmax(-1) for text in texts]
    best = [tiny_tokenizer.decode([int(p.argmax())]) for p in said]
    second = [tiny_tokenizer.decode([int(p.topk(2).indices[1])]) for p in said]
    subjects = ["cat", "dog", "tree", "two"]
    records = [Fact(text, subject, "water", word) for text, subject, word in zip(texts, subjects, best, strict=True)]
    records += [Fact(text, subject, "water", word) for text, subject, word in zip(texts, subjects, second, strict=True)]
    records.append(Fact(texts[0], subjects[0], "water", f"{best[0]} mat"))  # its first token
    records.append(Fact(texts[0], subjects[0], "water"))
    options: dict[str, Any] = {"progress": False}
    assert [known.fact for known in known_facts(model, tiny_tokenizer, records, least=0.0, **options)] == [*records[:4], records[8]]
    assert [known.fact for known in known_facts(model, tiny_tokenizer, records, 0.0, one_token=True, **options)] == records[:4]
    assert len(known_facts(model, tiny_tokenizer, records, 0.0, count=2, **options)) == 2
    sure = max(float(p.max()) for p in said) - 1e-4
    assert len(known_facts(model, tiny_tokenizer, records[:4], sure, **options)) == 1
