"""`steer features find|page|evaluate` on a tiny model in a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from features.words import sentences, word_dictionary
from tiny_experiment import write_model
from transformers import AutoModelForCausalLM

from steer.cli import main
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
