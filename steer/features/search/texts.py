"""Marked texts: rows of tokens, and which of them end a word of each concept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type, whole_number
from steer.errors import ConfigError, TokenizerError
from steer.features.training.texts import documents, first_tokens
from steer.model.tokens import Row, check_tokenizer

BLOCKS = 20  # that texts are split by: long enough that most of them are of other documents than their neighbours


@dataclass(frozen=True, eq=False)
class MarkedTexts:
    """Texts with the words of concepts marked.

    Attributes:
        rows: of tokens.
        marks: [tokens of all rows, one after the other, concepts] True at the last token of a word.
        starts: [rows] where each row begins in `marks`.

    Example:
        >>> marked = steer.features.search.MarkedTexts.read(tokenizer, texts, {"animals": ["cat", "dog"]}, context=16)
        >>> marked.marks.shape, marked.marked()  # [tokens, concepts], marks of each concept
    """

    rows: tuple[Row, ...]
    marks: Tensor
    starts: Tensor

    @classmethod
    def read(
        cls, tokenizer: Any, texts: Iterable[str], words: Mapping[str, Sequence[str]], *, context: int = 128, max_tokens: int | None = None
    ) -> MarkedTexts:
        """Tokenises texts and cuts each into rows.

        Words count wherever they stand alone, in small letters and capitals alike. Of a word of several tokens the last one is marked,
        since the model does not know the word before.

        Args:
            words: of each concept; a word may have spaces.
            context: tokens of a row at most, with those that the tokenizer puts before a text.
            max_tokens: texts are read until there are so many.

        Raises:
            TokenizerError: no text, or a tokenizer that does not know where its tokens stand. ConfigError: what is no list of texts.
        """
        check_tokenizer(tokenizer)
        whole_number(context, "`context`, the tokens of a row", least=4)
        of_type(texts, Iterable, "the texts", "pass a list of texts")
        of_type(texts, object if not isinstance(texts, str) else list, "the texts", "pass a list of texts, not one text")
        if not getattr(tokenizer, "is_fast", False):
            raise _slow(tokenizer)
        patterns = [_pattern(of_one) for of_one in words.values()]
        first = first_tokens(tokenizer)
        size = context - len(first)
        rows: list[Row] = []
        marks: list[Tensor] = []
        count = 0
        for document in (document for text in texts for document in documents(text)):
            encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
            marked = _marked(document, encoded.offset_mapping, patterns)  # [tokens, concepts]
            for start in range(0, len(encoded.input_ids), size):
                ids = (*first, *encoded.input_ids[start : start + size])
                rows.append(Row(ids, 0))
                marks.append(torch.cat([torch.zeros(len(first), len(patterns), dtype=torch.bool), marked[start : start + size]]))
                count += len(ids)
            if max_tokens is not None and count >= max_tokens:
                break
        if not rows:
            raise _no_text()
        return cls(tuple(rows), torch.cat(marks), _starts(rows))

    def split(self, share: float) -> tuple[MarkedTexts, MarkedTexts]:
        """Two parts, of which the second one has a share (above 0, below 1) of the text: blocks of rows in turn, so that either part has
        text from everywhere. Raises ConfigError where there are too few rows."""
        count = min(BLOCKS, len(self.rows))
        of_row = torch.arange(len(self.rows)) * count // len(self.rows)  # block of each row
        second = ((of_row + 1) * share + 1e-9).floor() > (of_row * share + 1e-9).floor()
        if len(self.rows) < 2 or not 0 < int(second.sum()) < len(self.rows):
            raise _unsplit(len(self.rows))
        return self._part(~second), self._part(second)

    def of(self, texts: Tensor, positions: Tensor) -> Tensor:
        """[n, concepts] marks of tokens: texts [n] are rows, positions [n] places in them."""
        return self.marks[self.starts[texts] + positions]

    def marked(self, first: int = 0) -> list[int]:
        """Marks of each concept, without those at the first tokens of rows."""
        lengths = torch.tensor([len(row.ids) for row in self.rows])
        position = torch.arange(len(self.marks)) - self.starts.repeat_interleave(lengths)
        return self.marks[position >= first].sum(0).tolist()

    def share_in(self, other: MarkedTexts) -> float:
        """Share of the tokens that are in rows that other texts have, too."""
        known = {row.ids for row in other.rows}
        return sum(len(row.ids) for row in self.rows if row.ids in known) / self.tokens

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return len(self.marks)

    def _part(self, chosen: Tensor) -> MarkedTexts:
        """The chosen of the rows. chosen: [rows] bool."""
        rows = tuple(row for row, is_in in zip(self.rows, chosen.tolist(), strict=True) if is_in)
        lengths = torch.tensor([len(row.ids) for row in self.rows])
        return MarkedTexts(rows, self.marks[chosen.repeat_interleave(lengths)], _starts(rows))


def _starts(rows: Sequence[Row]) -> Tensor:
    lengths = torch.tensor([0, *(len(row.ids) for row in rows)])
    return lengths.cumsum(0)[:-1]


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Any of the words where it stands alone, the longest first."""
    listed = "|".join(re.escape(word.strip()) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)


def _marked(document: str, offsets: Sequence[tuple[int, int]], patterns: Sequence[re.Pattern[str]]) -> Tensor:
    """[tokens, concepts] True at the token in which a word of the concept ends."""
    marks = torch.zeros(len(offsets), len(patterns), dtype=torch.bool)
    ends = torch.tensor([end for _, end in offsets])
    for place, pattern in enumerate(patterns):
        for found in pattern.finditer(document):
            token = int(torch.searchsorted(ends, found.end()))  # the first token that reaches to the end of the word
            if token < len(ends):
                marks[token, place] = True
    return marks


# ---- errors


def _slow(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        "words cannot be found among the tokens",
        expected="a fast tokenizer, which knows where its tokens stand in the text",
        found=type(tokenizer).__name__,
        remedy="load the fast tokenizer, or give labelled texts in the place of words",
    )


def _no_text() -> TokenizerError:
    return TokenizerError("there is no text", expected="at least one text with a token", found="none", remedy="give more text")


def _unsplit(rows: int) -> ConfigError:
    return ConfigError(
        "the texts are too short to keep some for the report",
        expected="at least one row of tokens in either part",
        found=f"{rows} rows",
        remedy="give more text, report_texts=, or a smaller context",
    )
