"""The shipped data set keeps its splits apart, and a damaged one is refused with the file and the line."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from tiny_experiment import write_data

from steer.errors import ConfigError, DamagedFileError
from steer.experiment.data import SPLITS, DataSet

Sets = dict[str, list[dict[str, str]]]


ALL = ("train", "heldout", "contrast", "probe", "neutral_text")


@pytest.fixture(scope="module")
def tone() -> Sets:
    return {split: DataSet("tone").split(split) for split in ALL}


def prompts(rows: list[dict[str, str]]) -> list[str]:
    return [row["prompt"].strip().lower() for row in rows]


def test_training_contrast_and_held_out_prompts_are_apart(tone: Sets) -> None:
    """Otherwise the behaviour gap would measure texts seen in training or in extraction."""
    for a, b in (("train", "heldout"), ("train", "contrast"), ("heldout", "contrast"), ("train", "probe")):
        assert not set(prompts(tone[a])) & set(prompts(tone[b])), f"{a} and {b} share a prompt"
    for split in ("train", "heldout", "contrast", "probe"):
        assert len(set(prompts(tone[split]))) == len(tone[split]), f"{split} repeats a prompt"


def test_both_answers_to_a_prompt_differ(tone: Sets) -> None:
    assert all(row["trait"] != row["neutral"] for row in tone["heldout"])
    assert all(row["positive"] != row["negative"] for row in tone["contrast"])


def test_no_sentence_of_an_answer_is_both_trained_on_and_held_out(tone: Sets) -> None:
    def sentences(texts: list[str]) -> set[str]:
        return {part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s", text)}

    trained = sentences([row["answer"] for row in tone["train"]])
    assert not trained & sentences([row["trait"] for row in tone["heldout"]])


def test_the_description_counts_the_rows(tone: Sets) -> None:
    readme = (files("steer.experiment") / "data" / "tone" / "README.md").read_text()
    counted = dict(re.findall(r"\| `(\w+)\.jsonl` \| (\d+) \|", readme))
    assert counted == {split: str(len(rows)) for split, rows in tone.items()}


def test_a_folder_of_your_own(tmp_path: Path) -> None:
    data = DataSet(write_data(tmp_path / "mine"))
    assert set(SPLITS) < set(ALL) and all(len(data.split(split)) == 4 for split in ALL)
    (tmp_path / "mine" / "more.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert data.split("more", ("question", "answer")) == [{"question": "q", "answer": "a"}], "splits are what files there are"


def test_texts_come_back_as_they_are(tmp_path: Path) -> None:
    text = "caf\u00e9 \u2028 line separators \U0001f600"  # a text-mode splitlines would cut at U+2028
    folder = write_data(tmp_path / "mine")
    (folder / "neutral_text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert DataSet(folder).split("neutral_text", ("text",)) == [{"text": text}]


def test_the_digest_is_that_of_the_rows(tmp_path: Path) -> None:
    """Not of the folder's name, nor of splits that are not read."""
    one, other = write_data(tmp_path / "one"), write_data(tmp_path / "other")
    wanted = DataSet(one).digest("train", "heldout")
    assert DataSet(other).digest("train", "heldout") == wanted != DataSet(other).digest("train")
    (other / "probe.jsonl").write_text('{"prompt": "other"}\n')
    assert DataSet(other).digest("train", "heldout") == wanted
    (other / "train.jsonl").write_text((other / "train.jsonl").read_text().replace("cat", "dog", 1))
    assert DataSet(other).digest("train", "heldout") != wanted


@pytest.mark.parametrize("name", ["tnoe", "no/such/folder"])
def test_an_unknown_set(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no data set '{name}'") as caught:
        DataSet(name)
    assert "tone" in str(caught.value.expected) and "contrast.jsonl" in str(caught.value.expected) and caught.value.remedy


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "train.jsonl is missing"),
        (b"", "train.jsonl has no lines"),
        (b'{"prompt": "p", "answer": "t"}\n{"prompt": \n', "train.jsonl, line 2 is not JSON"),
        (b'{"prompt": "\xff\xfe", "answer": "t"}', "train.jsonl, line 1 is not JSON"),
        (b'["p", "t", "n"]', "train.jsonl, line 1 is no object"),
        (b'\n{"prompt": "p"}', "train.jsonl, line 2 lacks answer"),
        (b'{"prompt": "  ", "answer": 3}', "train.jsonl, line 1 lacks prompt, answer"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = write_data(tmp_path / "mine") / "train.jsonl"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=re.escape(says)) as caught:
        DataSet(tmp_path / "mine").split("train")
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


def test_a_text_that_a_metric_reads_is_looked_for_in_every_row(tmp_path: Path) -> None:
    data = DataSet(write_data(tmp_path / "mine"))
    file = tmp_path / "mine" / "heldout.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], "", '{"prompt": "p", "trait": "t", "neutral": " "}', *rows[1:]]))
    with pytest.raises(DamagedFileError, match="heldout.jsonl, line 3 lacks neutral"):
        data.split("heldout", ("prompt", "trait", "neutral"))
    assert len(data.split("heldout")) == 5, "who reads no `neutral` needs none"
