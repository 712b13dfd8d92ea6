"""A data set with the splits of `gender_pronoun` in the words of the tiny tokenizer, and the circuits that are found on it."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.experiment.data import DataSet
from steer.experiment.pronoun_circuits import PronounCircuits

FIND, TEST = ("cat", "dog", "tree", "mat"), ("house", "sun", "moon")
SENTENCES = ("the {occupation} is good and", "where is the {occupation} and", "a {occupation} ran under")
SPLITS = {
    "occupations": "occupations_find",
    "sentences": "sentences_find",
    "gender_words": "gender_words_find",
    "constants": "constants",
    "learning": "learning",
}


def write_splits(folder: Path) -> Path:
    """A data set with the splits of `gender_pronoun`, in the words of the tiny tokenizer."""
    folder.mkdir(parents=True)
    running = [{"text": " ".join([f"the cat sat on the {place} and the dog ran"] * 10), "source": "cats"} for place in ("mat", "house")]
    gendered = [{"male": "sun", "female": "moon"}, {"male": "day", "female": "night"}]
    test = [
        {"prompt": text.replace("{occupation}", word), "baseline": text.replace("{occupation}", "game"), "first": " he", "second": " she"}
        for text in SENTENCES[:2]
        for word in TEST
    ]
    splits = {
        "occupations_find": [{"text": word} for word in FIND],
        "sentences_find": [{"text": text, "male": " he", "female": " she"} for text in SENTENCES],
        "gender_words_find": gendered,
        "constants": running,
        "learning": running,
        "occupations_test": test,
        "sentences_test": test[:3],
        "facts_test": [{key: row[key] for key in ("prompt", "first", "second")} for row in test[:4]],
        "damage": running,
    }
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def pronoun_circuits(model: nn.Module, folder: Path) -> PronounCircuits:
    """Of a tiny model, on a data set that is written below a folder."""
    data = DataSet(write_splits(folder / "data"))
    return PronounCircuits(model, tiny_tokenizer(), data, SPLITS, baseline="game", folder=folder / "circuits")
