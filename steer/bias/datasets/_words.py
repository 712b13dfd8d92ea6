"""Word lists as items: of a table with one column, or as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.bias.items import Word
from steer.checks import of_type
from steer.data_files import fields, table_rows
from steer.errors import ConfigError, DamagedFileError
from steer.reading import damaged


def words_of_files(paths: Sequence[Path], column: str) -> list[Word]:
    """Words of a CSV file, in the column of that name in any case. Raises DamagedFileError."""
    items = []
    for path in paths:
        rows = table_rows(path, ())
        name = next((name for name in rows[0] if name.strip().lower() == column), None)
        if name is None:
            raise _no_column(path, column, list(rows[0]))
        for number, row in enumerate(rows, 1):
            (word,) = fields(row, {name: str}, path, f"row {number}")
            items.append(Word(word.strip(), column, word.strip()))
    return items


def given_words(words: Any, kind: str) -> list[Word]:
    """Raises ConfigError for no words, and for one twice."""
    of_type(words, (list, tuple), f"the words of {kind}", "pass a list of words")
    for word in words:
        of_type(word, str, f"one of the words of {kind}", "pass text")
    if not words or not all(word.strip() for word in words) or len(set(words)) < len(words):
        raise _no_words(words, kind)
    return [Word(word, kind, word) for word in words]


# ---- errors


def _no_column(path: Path, column: str, head: list[str]) -> DamagedFileError:
    return damaged(path, f"a column '{column}'", ", ".join(head), remedy=f"name the column of the words '{column}'")


def _no_words(words: Sequence[str], kind: str) -> ConfigError:
    doubles = next((word for word in words if list(words).count(word) > 1), "none, or an empty one")
    return ConfigError(f"the words of {kind} cannot be measured", expected="words, each once", found=doubles, remedy="correct the list")
