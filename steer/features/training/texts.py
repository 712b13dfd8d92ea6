"""Texts as rows of tokens, all of one length, for the training of dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type, whole_number
from steer.errors import ConfigError, FileError, TokenizerError
from steer.features.training.dictionary_config import generator
from steer.model.tokens import check_tokenizer
from steer.reading import place_of

ENDINGS = (".txt", ".md")


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens in random order. ids: [rows, context].

    Example:
        >>> rows = steer.features.training.token_rows(tokenizer, texts, context=16)
        >>> rows.ids.shape, rows.context
    """

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        """Tokens of each row."""
        return self.ids.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()


def read_texts(where: str | Path, *, split: str = "train", field: str = "text", subset: str | None = None) -> Iterator[str]:
    """Texts of a file, of a folder of files (.txt, .md), or of a data set of the `datasets` library; documents end at blank lines.

    Args:
        where: path, or the name of a data set, which needs the package `datasets`.
        split, field, subset: of the data set.

    Raises:
        FileError: nothing there, or no text in it. ConfigError: a split, field or subset of files, which have none.

    Example:
        >>> from pathlib import Path
        >>> file = Path("corpus.txt")
        >>> characters = file.write_text("The cat sat on the mat.")
        >>> list(steer.features.training.read_texts(file))
        ['The cat sat on the mat.']
    """
    path = place_of(where)
    if path.exists() and (said := _said_of_a_data_set(split, field, subset)):
        raise _no_data_set_but_files(where, said)
    if path.is_file():
        yield _text_of(path)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file())
        if not files:
            raise _no_text_files(path)
        yield from map(_text_of, files)
    elif path.exists() or str(where).startswith((".", "/", "~")) or path.suffix in ENDINGS:
        raise _nothing_there(where)
    else:
        yield from _of_data_set(str(where), split, field, subset)


def _said_of_a_data_set(split: str, field: str, subset: str | None) -> str:
    said = {"split": (split, "train"), "field": (field, "text"), "subset": (subset, None)}
    return ", ".join(f"{name}={value}" for name, (value, default) in said.items() if value != default)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _of_data_set(name: str, split: str, field: str, subset: str | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise _no_datasets(name) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
        texts = rows[field]
    except Exception as error:  # no network, no such set, no such field: many classes
        raise _no_data_set(name, error) from error
    for text in texts:
        of_type(text, str, f"the field '{field}' of the data set '{name}'", "set text.field to a field of text")
        yield text


def token_rows(tokenizer: Any, texts: Iterable[str], *, context: int = 128, seed: int = 0, max_tokens: int | None = None) -> TokenRows:
    """Tokenises texts, one behind the other with the end-of-text token between, and cuts them into rows, which are put in random order.

    A row begins with the token that the tokenizer puts before every text, where it does.

    Args:
        context: tokens of a row.
        seed: of their order.
        max_tokens: texts are read until there are so many.

    Raises:
        TokenizerError: texts that are too short for one row. ConfigError: no tokenizer, no texts, or a row without room.

    Example:
        >>> rows = steer.features.training.token_rows(tokenizer, texts, context=16)
        >>> rows.ids.shape  # [rows, context]
    """
    check_tokenizer(tokenizer)
    whole_number(context, "`context`, the tokens of a row", least=4)
    of_type(texts, Iterable, "the texts", "pass a list of texts")
    of_type(texts, object if not isinstance(texts, str) else list, "the texts", "pass a list of texts, not one text")
    first = first_tokens(tokenizer)
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = context - len(first)
    tokens: list[int] = []
    for document in (document for text in texts for document in documents(text)):
        tokens += [*tokenizer(document, add_special_tokens=False).input_ids, *between]
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
    rows = len(tokens) // size
    if rows == 0:
        raise _too_short(len(tokens), size)
    ids = torch.tensor(tokens[: rows * size], dtype=torch.int32).view(rows, size)
    ids = torch.cat([torch.tensor(first, dtype=torch.int32).expand(rows, -1), ids], 1)  # [rows, context]
    return TokenRows(ids[torch.randperm(rows, generator=generator(seed, "rows"))])


def documents(text: str, at_least: int = 2000) -> Iterator[str]:
    """Pieces of a text of some thousand characters, cut at blank lines: tokenizers take long for one of megabytes."""
    of_type(text, str, "one of the texts", "pass text")
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= at_least:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if "".join(piece).strip():
        yield "\n\n".join(piece)


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


# ---- errors


def _nothing_there(where: str | Path) -> FileError:
    expected = "a text file, a folder of text files, or the name of a data set"
    return FileError(f"no texts at '{where}'", expected=expected, found="nothing there", remedy="check the path")


def _no_text_files(path: Path) -> FileError:
    expected = f"files that end in {' or '.join(ENDINGS)}"
    return FileError(f"no texts in '{path}'", expected=expected, found="none", remedy="name another folder, or one file by its path")


def _no_data_set_but_files(where: str | Path, said: str) -> ConfigError:
    remedy = "leave it out, or name a data set of the package datasets"
    return ConfigError(f"'{where}' is no data set", expected="a path alone", found=said, remedy=remedy)


def _unreadable(path: Path, error: Exception) -> FileError:
    return FileError(f"'{path}' is no text", expected="UTF-8", found=str(error)[:200], remedy="convert it")


def _no_datasets(name: str) -> FileError:
    remedy = "pip install datasets, or check the path if a file was meant"
    return FileError(
        f"no file '{name}', and data sets cannot be read", expected="the package datasets", found="not installed", remedy=remedy
    )


def _no_data_set(name: str, error: Exception) -> FileError:
    return FileError(
        f"no file and no data set '{name}'",
        expected="a path, or a data set with the split and the field that were named",
        found=f"{type(error).__name__}: {str(error)[:200]}",
        remedy="check the name, text.split, text.field and text.subset, and the network",
    )


def _too_short(tokens: int, size: int) -> TokenizerError:
    what = "there is no text" if tokens == 0 else "the texts are shorter than one row"
    remedy = "give more text, or lower context"
    return TokenizerError(what, expected=f"at least {size} tokens", found=tokens, remedy=remedy)
