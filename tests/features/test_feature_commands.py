"""`steer features find|page|evaluate` on a tiny model in a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from features.words import sentences, word_dictionary
from tiny_experiment import write_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from steer.cli import main
from steer.commands.features_texts import labelled_texts
from steer.features.reading import FeatureReading
from steer.features.search import FoundFeatures

FEATURES = ["sun", "cat", "fire", "dog", "the", "water"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with a model, a dictionary of it, and text; what Hydra does to logging is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    write_model(tmp_path / "model")
    word_dictionary(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), FEATURES).save(tmp_path / "sae")
    (tmp_path / "book.txt").write_text("\n\n".join(sentences(300)))
    lines = [f"{text} dog" if i % 2 else text.replace("dog", "the") for i, text in enumerate(sentences(60, seed=5, length=7))]
    (tmp_path / "dogs.jsonl").write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(lines)))
    yield tmp_path
    root.handlers[:], root.level = handlers, level


def test_find_prints_and_writes_what_it_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concepts = ["concepts.animal=[cat,dog]", "labelled.dogs=dogs.jsonl"]
    status = main(["features", "find", "dictionary.path=sae", "model.name=model", "data=book.txt", "top=2", *concepts])
    out = capsys.readouterr()
    assert (status, "animal" in out.out, "average_precision, report" in out.out) == (0, True, True), out.err
    found = FoundFeatures.load(place / "outputs/features/find/found.safetensors")
    assert {one.feature for one in found.of("animal")} == {1, 3} and found.best("dogs") == 3
    again = ["by=output_score", "settings.candidates=4", "settings.length=4", "folder=steered"]
    assert main(["features", "find", "dictionary.path=sae", "model.name=model", "data=book.txt", "top=2", concepts[0], *again]) == 0
    assert FoundFeatures.load(place / "steered/found.safetensors").by == "output_score"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs the key 'dictionary.path'"),
        (["dictionary.path=nowhere", "concepts.a=[cat]"], "nowhere"),
        (["dictionary.path=sae", "by=activaton"], "did you mean 'activation'"),
        (["dictionary.path=sae", "settings.strenght=3"], "'activation' cannot be made with these settings"),
        (["dictionary.path=sae", "model.name=model"], "no concepts"),
        (["dictionary.path=sae", "model.name=model", "labelled.x=gone.jsonl"], "no labelled texts at 'gone.jsonl'"),
        (["dictionary.path=sae", "model.name=model", "labelled.x=book.txt"], "line 1 of 'book.txt' is no labelled text"),
        (["dictionary.path=sae", "widht=3"], "has no key 'widht'"),
    ],
)
def test_mistakes_of_find_are_named(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["features", "find", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_page_writes_a_page_a_reading_and_neuronpedias_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dictionary.path=sae", "model.name=model", "data=book.txt", "explainer=peak_words", "settings.count=1", "features=[1,3]"]
    export = {"model": "tiny", "source_set": "words", "title": "Words", "creator": "nobody", "creator_id": "c1"}
    arguments += [f"neuronpedia.{key}={value}" for key, value in export.items()]
    assert main(["features", "page", *arguments]) == 0, capsys.readouterr().err
    folder = place / "outputs/features/page"
    assert FeatureReading.load(folder / "reading.safetensors").names == {1: "cat", 3: "dog"}
    page = (folder / "page.html").read_text()
    assert '"name":"cat"' in page and "the commonest tokens at the peaks" in page
    assert {path.name for path in (folder / "neuronpedia/tiny/0-words").iterdir()} >= {"source.jsonl", "features", "explanations"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dictionary.path=sae"], "needs the key 'data'"),
        (["dictionary.path=sae", "data=book.txt", "neuronpedia.model=x"], "no source_set, title, creator, creator_id"),
        (["dictionary.path=sae", "data=book.txt", "explainer=peak_word"], "did you mean 'peak_words'"),
        (["dictionary.path=sae", "data=gone.txt", "model.name=model"], "gone.txt"),
        (["dictionary.path=sae", "data=book.txt", "model.name=model", "features=[99]"], "outside the dictionary"),
    ],
)
def test_mistakes_of_page_are_named(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["features", "page", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_evaluate_measures_what_there_is_text_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [
        {"text": f"{text.replace('cat', 'a').replace('fire', 'a')} {word}", "label": word}
        for word in ("cat", "fire")
        for text in sentences(20)
    ]
    (place / "classes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in classes))
    arguments = [
        "dictionary.path=sae",
        "model.name=model",
        "data=book.txt",
        "labelled.dogs=dogs.jsonl",
        "classes=classes.jsonl",
        "ablated=[1,2]",
    ]
    status = main(["features", "evaluate", *arguments, "context=32"])
    out = capsys.readouterr()
    assert status == 0 and "reconstruction" in out.out and "accuracy of probes" in out.out and "targeted perturbation" in out.out, out.err
    metrics = json.loads((place / "outputs/features/evaluate/metrics.json").read_text())
    assert metrics["sparse_probing"]["dogs"]["features_1"] == [3] and metrics["sparse_probing"]["dogs"]["top_1"] == 1
    assert set(metrics["targeted_perturbation"]["score"]) == {"1", "2"} and 0 < metrics["reconstruction"]["fvu"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "has nothing to measure on"),
        (["classes=gone.jsonl"], "no labelled texts at 'gone.jsonl'"),
        (["classes=dogs.jsonl"], "line 1 of 'dogs.jsonl' is no labelled text"),
        (["labelled.a=latin.jsonl"], "line 2 of 'latin.jsonl' is no labelled text"),
    ],
)
def test_mistakes_of_evaluate_are_named(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    (place / "latin.jsonl").write_bytes('{"text": "a cat", "label": 0}\n{"text": "a café", "label": 1}\n'.encode("latin-1"))
    assert main(["features", "evaluate", "dictionary.path=sae", "model.name=model", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_labelled_text_may_hold_any_sign_and_is_held_out_alone_where_it_has_no_group(tmp_path: Path) -> None:
    texts = ["one two", "three\u2028four", "five\x85six", "seven eight"]
    records = [{"text": text, "label": i % 2, **({"group": "a"} if i == 0 else {})} for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    read = labelled_texts(tiny_tokenizer(), tmp_path / "texts.jsonl")
    assert len(read.rows) == 4 and read.groups[0] == "a" and len(set(read.groups)) == 4
