"""The text of each token of a sequence, spaces included, as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TokenTexts:
    """Gives the text of each token: what it adds to the tokens before it.

    A tokenizer drops the space before a token that stands alone. A character of several tokens belongs to the last of them.

    Example:
        >>> texts = TokenTexts(tokenizer)
        >>> [texts.add(token) for token in tokenizer("a cat").input_ids]
        ['a', ' cat']
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text = ""

    def add(self, token: int) -> str:
        """The text of the next token; empty where its character is not complete yet."""
        self._ids.append(token)
        before, self._text = self._text, self._tokenizer.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}")
        return self._text[len(before) :]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token of a sequence, see `TokenTexts`."""
    texts = TokenTexts(tokenizer)
    return [texts.add(token) for token in ids]
