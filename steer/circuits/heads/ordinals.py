"""Ordinal tasks: words in an order that everybody knows, on which successor heads show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.errors import TokenizerError

ORDINALS: Mapping[str, tuple[str, ...]] = {
    "digits": tuple("123456789"),
    "numbers": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "ranks": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
Task = Sequence[int | None]  # token ids in their order; None for a word that is more than one token


def ordinal_tasks(tokenizer: Any) -> dict[str, list[int | None]]:
    """Tokens of the words of each task, with a space before them or without, whichever makes more of them single tokens.

    Raises:
        TokenizerError: no task has two words in a row that are single tokens.
    """
    tasks = {}
    for name, words in ORDINALS.items():
        forms = [[_single(tokenizer, space + word) for word in words] for space in (" ", "")]
        best = max(forms, key=lambda tokens: len(successions(tokens)))
        if successions(best):
            tasks[name] = best
    if not tasks:
        raise _no_single_tokens(tokenizer)
    return tasks


def successions(task: Task) -> list[tuple[int, int]]:
    """Tokens and their successors."""
    return [(one, following) for one, following in zip(task, task[1:], strict=False) if one is not None and following is not None]


def _single(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return int(ids[0]) if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None) else None


# ---- errors


def _no_single_tokens(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        "no ordinal words are single tokens",
        expected="two words in a row of " + ", ".join(ORDINALS),
        found=f"none with {type(tokenizer).__name__}",
        remedy="pass `tasks`, lists of token ids in their order",
    )
