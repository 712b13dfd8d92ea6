"""Irrelevant texts of a given number of tokens: what a prompt is compared with, so that its words are tested and not its length."""

from __future__ import annotations

import random
from importlib.resources import files
from typing import Any

from steer.errors import ConfigError

_TRIES = 200


def irrelevant_text(tokenizer: Any, like: str, seed: int) -> str:
    """A text about nothing in particular with as many tokens as another one.

    Sentences of `steer/experiment/data/irrelevant.txt` in a random order, cut where the number of tokens is reached.

    Raises:
        ConfigError: no cut of them has that number of tokens.
    """
    wanted = n_tokens(tokenizer, like)
    chooser = random.Random(seed)
    sentences = (files("steer.experiment") / "data" / "irrelevant.txt").read_text(encoding="utf-8").splitlines()
    for _ in range(_TRIES):
        text = ""
        while n_tokens(tokenizer, text) < wanted:
            text = f"{text} {' '.join(chooser.sample(sentences, len(sentences)))}".strip()
        words = text.split(" ")
        low, high = 1, len(words)
        while low < high:  # the fewest words with enough tokens
            middle = (low + high) // 2
            low, high = (middle + 1, high) if n_tokens(tokenizer, " ".join(words[:middle])) < wanted else (low, middle)
        cut = " ".join(words[:low])
        if n_tokens(tokenizer, cut) == wanted:
            return cut
    raise _no_such_length(wanted)


def n_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text, without those that a tokenizer adds."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


# ---- errors


def _no_such_length(wanted: int) -> ConfigError:
    return ConfigError(
        "no irrelevant prompt of the same length was found",
        expected=f"{wanted} tokens",
        found=f"none in {_TRIES} orders of the sentences",
        remedy="change the prompt by a word, or write the control yourself, as an arm with a prompt of its own",
    )
