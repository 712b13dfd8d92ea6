"""Locating the subject of a fact in the tokens of a text, and the tokens of its answer.

Tokens are found by the characters that they stand for (`offset_mapping`), never by tokenising pieces of the text: "Paris" may be half a
token of "Parisian", and a token may carry the blank before a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from steer.edits.fact import Fact
from steer.errors import EditError, SubjectNotFoundError, TokenizerError
from steer.model.tokens import Row, check_tokenizer

_ANCHOR = "a"  # a word that a target is tokenised behind


@dataclass(frozen=True)
class Located:
    """The subject in a tokenised text.

    Attributes:
        ids: tokens of the whole text.
        first, last: indices of the first and the last token of the subject.
        occurrences: how often the text says the subject; the last time is meant.
        spans_past: the last token reaches over the end of the subject ("Paris" in "Parisian").
        at_start: the subject is one token and nothing is before it, not even a start-of-text token. The key of such a token hardly depends
            on the subject, since much attention rests on the first token of a text, whatever it is.

    Example:
        >>> located = locate(tokenizer, "the red cat sat", "red cat")
        >>> located.ids[located.first : located.last + 1], located.occurrences
    """

    ids: tuple[int, ...]
    first: int
    last: int
    occurrences: int
    spans_past: bool
    at_start: bool

    def __repr__(self) -> str:
        return f"Located(tokens {self.first} to {self.last} of {len(self.ids)})"


def target_ids(tokenizer: Any, target: str) -> tuple[int, ...]:
    """Tokens of an answer: of a blank and the target without the blanks around it, without special tokens.

    They are read behind a word, because some tokenizers (SentencePiece) put one more blank before the first word of a text.

    Raises:
        EditError: an empty target. TokenizerError: one that gives no tokens. ConfigError: no tokenizer.

    Example:
        >>> tokenizer.decode(target_ids(tokenizer, "Paris"))
        ' Paris'
    """
    check_tokenizer(tokenizer)
    stripped = target.strip()
    if not stripped:
        raise _empty_target()
    anchor = _plain_ids(tokenizer, _ANCHOR)
    behind = _plain_ids(tokenizer, f"{_ANCHOR} {stripped}")
    ids = behind[len(anchor) :] if behind[: len(anchor)] == anchor else _plain_ids(tokenizer, f" {stripped}")
    if not ids:
        raise _no_target_tokens(target)
    return tuple(ids)


def check_known(tokenizer: Any, fact: Fact, located: Located) -> None:
    """Raises EditError where the target of a fact, or the last token of its subject, is the one that stands for all unknown words.

    located: the subject in the prompt.
    """
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in target_ids(tokenizer, fact.target):
        raise _unknown("the target", fact.target, tokenizer)
    if unknown is not None and located.ids[located.last] == unknown:
        raise _unknown("the end of the subject", fact.subject, tokenizer)


def text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of a text as `locate` has them, for texts without a subject. Raises TokenizerError, ConfigError.

    Example:
        >>> tokenizer.decode(text_ids(tokenizer, " the red cat"))
        ' the red cat'
    """
    return _encoded(tokenizer, text)[0]


def answer_row(tokenizer: Any, text: str, target: str) -> Row:
    """A text and an answer to it, which is the response of the row. Raises as `target_ids`.

    Example:
        >>> answer_row(tokenizer, fact.prompt, fact.target).response  # tokens of the answer
        1
    """
    ids = text_ids(tokenizer, text)
    return Row((*ids, *target_ids(tokenizer, target)), len(ids))


def locate(tokenizer: Any, text: str, subject: str, *, start: int = 0) -> Located:
    """Finds the last occurrence of a subject in a text: that of whole words where there is one, else within a word.

    Args:
        tokenizer: a fast one, which knows where its tokens start.
        text: plain, or as a chat template renders it. One that begins with a special token is complete: the tokenizer adds none.
        start: character of the text before which nothing is looked for, e.g. the length of a context before the prompt.

    Raises:
        SubjectNotFoundError: the subject is not in the text. EditError: an empty subject. TokenizerError: a slow tokenizer.
        ConfigError: no tokenizer.

    Example:
        >>> located = locate(tokenizer, "The mother tongue of Danielle Darrieux is", "Danielle Darrieux")
        >>> located.last  # of the tokens of the subject
    """
    subject = subject.strip()
    if not subject:
        raise _empty_subject(text)
    begin, occurrences = _last_occurrence(text, subject, start)
    ids, offsets = _encoded(tokenizer, text)
    end = begin + len(subject)
    inside = [token for token, (opens, closes) in enumerate(offsets) if opens < end and closes > begin]
    if not inside:
        raise _no_tokens_of_subject(text, subject)
    first, last = inside[0], inside[-1]
    return Located(ids, first, last, occurrences, spans_past=offsets[last][1] > end, at_start=last == 0)


def _last_occurrence(text: str, subject: str, start: int) -> tuple[int, int]:
    """Where the subject begins, and how often the text says it. Raises SubjectNotFoundError."""
    written = re.escape(subject)
    whole_words = [match.start() for match in re.finditer(rf"(?<!\w){written}(?!\w)", text) if match.start() >= start]
    found = whole_words or [match.start() for match in re.finditer(written, text) if match.start() >= start]
    if not found:
        raise _not_found(text[start:], subject)
    return found[-1], len(found)


def _encoded(tokenizer: Any, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids and the characters [opens, closes) that each stands for; empty ones for special tokens that the tokenizer adds.

    What a tokenizer puts behind a text (an end-of-text token) is left out, since the answer follows there.
    """
    check_tokenizer(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise _slow(tokenizer)
    is_complete = any(token and text.startswith(token) for token in tokenizer.all_special_tokens)
    encoded = tokenizer(text, add_special_tokens=not is_complete, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), [(opens, closes) for opens, closes in encoded.offset_mapping]
    while offsets and offsets[-1][0] == offsets[-1][1]:
        ids.pop()
        offsets.pop()
    return tuple(ids), offsets


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- errors


def _empty_target() -> EditError:
    return EditError("the target of a fact is empty", expected="text", found="blanks or nothing", remedy="say what the answer shall be")


def _no_target_tokens(target: str) -> TokenizerError:
    return TokenizerError("the target of a fact gives no tokens", expected="at least one", found=repr(target), remedy="write it otherwise")


def _unknown(what: str, words: str, tokenizer: Any) -> EditError:
    return EditError(
        f"the tokenizer does not know {what} of a fact",
        expected="words that have tokens of their own",
        found=f"'{tokenizer.unk_token}' for a part of '{words}', as for every unknown word",
        remedy="write it in other words, or use a model whose tokenizer knows it",
    )


def _empty_subject(text: str) -> EditError:
    return EditError("the subject of a fact is empty", expected="words of the prompt", found=repr(text), remedy="say what it is about")


def _not_found(text: str, subject: str) -> SubjectNotFoundError:
    return SubjectNotFoundError(
        f"the subject '{subject}' is not in the text",
        expected="a text that contains the subject as it is written",
        found=repr(text),
        remedy="write both alike, capitals and blanks included",
    )


def _no_tokens_of_subject(text: str, subject: str) -> TokenizerError:
    return TokenizerError(
        f"no token stands for the subject '{subject}'",
        expected="at least one",
        found=f"none in {text!r}",
        remedy="look at what the tokenizer makes of the text: its normaliser may drop these letters",
    )


def _slow(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        "this tokenizer does not say where its tokens start",
        expected="a fast tokenizer of transformers, with offset_mapping",
        found=type(tokenizer).__name__,
        remedy="load it with use_fast=True",
    )
