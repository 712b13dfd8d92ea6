"""Files of labelled texts for the commands that read features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.errors import DamagedFileError, FileError
from steer.lens.labelled import LabelledTexts
from steer.reading import place_of


def labelled_texts(tokenizer: Any, where: str | Path) -> LabelledTexts:
    """Texts of a file with a line {"text": ..., "label": ..., "group": ...} each; labels are 0 and 1, groups may be left out.

    Raises:
        FileError: no such file. DamagedFileError: a line that is none of these, by its number. ContrastError: a text that comes twice.
    """
    records = _records(where, lambda label: label in (0, 1), '{"text": "...", "label": 0 or 1}, with "group" as text or without')
    has_groups = any(record.get("group") is not None for record in records)
    # a text without a group is one of its own: all of them together would be held out together
    groups = [record.get("group") or f"text {i} without a group" for i, record in enumerate(records)] if has_groups else ()
    texts, labels = ([record[key] for record in records] for key in ("text", "label"))
    return LabelledTexts.from_texts(tokenizer, texts, labels, groups=groups)


def texts_by_class(where: str | Path) -> dict[str, list[str]]:
    """Texts of a file with a line {"text": ..., "label": "<class>"} each, by class. Raises as `labelled_texts`."""
    by_class: dict[str, list[str]] = {}
    for record in _records(where, lambda label: isinstance(label, str) and label != "", '{"text": "...", "label": "<class>"}'):
        by_class.setdefault(record["label"], []).append(record["text"])
    return by_class


def _records(where: str | Path, is_label: Callable[[Any], bool], expected: str) -> list[dict[str, Any]]:
    path = place_of(where)
    if not path.is_file():
        raise _no_file(path)
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of text, they would end at signs that may stand in one, too
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            fits = isinstance(record["text"], str) and is_label(record["label"]) and isinstance(record.get("group"), str | None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _wrong_line(path, number, line, expected) from error
        if not fits:
            raise _wrong_line(path, number, line, expected)
        records.append(record)
    return records


# ---- errors


def _no_file(path: Path) -> FileError:
    return FileError(f"no labelled texts at '{path}'", expected="a file of JSON lines", found="nothing there", remedy="check the path")


def _wrong_line(path: Path, number: int, line: bytes, expected: str) -> DamagedFileError:
    found = line.decode(errors="replace")[:120]
    return DamagedFileError(
        f"line {number} of '{path}' is no labelled text", expected=f"{expected}, in UTF-8", found=found, remedy="correct it"
    )
