"""BBQ (2110.08193): questions about contexts that do not say the answer, and about the same contexts when they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import Question
from steer.bias.metrics.bbq import bbq
from steer.data_files import fields, json_lines, known_label, table_rows
from steer.errors import DamagedFileError
from steer.reading import damaged

METADATA = "additional_metadata.csv"
CONDITIONS, POLARITIES = ("ambig", "disambig"), ("neg", "nonneg")
ANSWERS = ("ans0", "ans1", "ans2")
_ALIASES = {"woman": "f", "girl": "f", "women": "f", "man": "m", "boy": "m", "men": "m", "low ses": "lowses", "high ses": "highses"}
Key = tuple[str, str, str]  # category, question index, example id


@DATASETS.register("bbq")
class BBQ(BiasDataset):
    """BBQ: accuracy, and how often wrong or free answers agree with the stereotype, in ambiguous and disambiguated contexts."""

    files = ("*.jsonl", METADATA)
    wheel = "BBQ"
    hub = ("oskarvanderwal/bbq", "All", "test")
    metric = bbq

    def read(self, paths: Sequence[Path]) -> list[Question]:
        lines = [path for path in paths if path.suffix == ".jsonl"]
        tables = [path for path in paths if path.name == METADATA]
        if not tables and lines:
            tables = [path for path in [lines[0].with_name(METADATA)] if path.exists()]
        known = _metadata(tables)
        return [_question(row, path, f"line {number}", known) for path in lines for number, row in enumerate(json_lines(path), 1)]

    def read_rows(self, rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
        return [_question(row, source, f"row {number}", {}) for number, row in enumerate(rows, 1)]

    def notes(self, items: Sequence[Any]) -> tuple[str, ...]:
        unknown = sum(item.biased is None for item in items)
        told = (
            f"the stereotyped answer of {unknown} of {len(items)} questions is not known ({METADATA} has it): they count in accuracy alone"
        )
        return (told,) if unknown else ()


def _metadata(paths: Sequence[Path]) -> dict[Key, tuple[int | None, bool]]:
    """By question: number of the answer that agrees with the stereotype, and whether people are named."""
    known: dict[Key, tuple[int | None, bool]] = {}
    for path in paths:
        for number, row in enumerate(table_rows(path, ("category", "question_index", "example_id", "target_loc")), 1):
            target = known_label(row["target_loc"], ("0", "1", "2", "NA", ""), "target_loc", path, f"row {number}")
            place = int(target) if target in ("0", "1", "2") else None
            known[row["category"], row["question_index"], row["example_id"]] = place, row.get("label_type") == "name"
    return known


def _question(row: Mapping[str, Any], path: object, place: str, known: Mapping[Key, tuple[int | None, bool]]) -> Question:
    kinds: dict[str, Any] = {"example_id": int, "question_index": (str, int), "question_polarity": str, "context_condition": str}
    kinds |= {"category": str, "context": str, "question": str, "label": (int, str), "answer_info": Mapping, **dict.fromkeys(ANSWERS, str)}
    example, index, polarity, condition, category, context, question, label, info, *answers = fields(row, kinds, path, place)
    known_label(condition, CONDITIONS, "context_condition", path, place)
    known_label(polarity, POLARITIES, "question_polarity", path, place)
    label = ANSWERS.index(label) if label in ANSWERS else label  # a class of the hub has a name
    groups = [_group(info, name, path, place) for name in ANSWERS]
    unknown = [number for number, group in enumerate(groups) if group == "unknown"]
    if len(unknown) != 1 or label not in (0, 1, 2):
        raise _no_unknown(path, groups, label, place)
    key = category, str(index), str(example)
    target, by_name = known.get(key, (_target(row, groups, unknown[0], polarity), False))
    if target == unknown[0]:
        target = None
    return Question(
        f"{category} {index} {example}",
        category,
        context,
        question,
        tuple(answers),
        label,
        unknown[0],
        target,
        condition == "ambig",
        by_name,
    )


def _group(info: Mapping[str, Any], name: str, path: object, place: str) -> str:
    entry = info.get(name)
    if not isinstance(entry, Sequence) or isinstance(entry, str) or not entry or not isinstance(entry[-1], str):
        raise damaged(str(path), f"answer_info.{name}: [text, group]", f"{entry!r:.60} at {place}")
    return entry[-1].lower()


def _target(row: Mapping[str, Any], groups: Sequence[str], unknown: int, polarity: str) -> int | None:
    """Number of the answer that agrees with the stereotype, from the groups alone: the stereotyped one where the question is put
    negatively, the other one where not. So `target_loc` of the metadata means it too."""
    metadata = row.get("additional_metadata")
    named = metadata.get("stereotyped_groups") if isinstance(metadata, Mapping) else None
    stereotyped = {_alias(str(group).lower()) for group in named or []}
    found = [number for number, group in enumerate(groups) if _alias(group) in stereotyped]
    if len(found) != 1 or found[0] == unknown:
        return None
    return found[0] if polarity == "neg" else 3 - found[0] - unknown


def _alias(group: str) -> str:
    return _ALIASES.get(group, group)


# ---- errors


def _no_unknown(path: object, groups: list[str], label: object, place: str) -> DamagedFileError:
    return damaged(str(path), "one answer of the group 'unknown', and a label from 0 to 2", f"{groups}, label {label} at {place}")
