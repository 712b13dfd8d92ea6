"""Irrelevant texts of a given number of tokens: what a prompt is compared with, so that its words are tested and not its length."""

from __future__ import annotations

import random
from importlib.resources import files
from typing import Any

from steer.errors import ConfigError

_TRIES = 200  # orders of the sentences
_IN_VAIN = 40  # further texts in a row that are known already


def irrelevant_texts(tokenizer: Any, like: str, number: int) -> list[str]:
    """Texts about nothing in particular with as many tokens as another one, all different; fewer than asked for where there are no more.

    Sentences of `steer/experiment/data/irrelevant.txt` in a random order, cut where the number of tokens is reached. Of few tokens there
    are few such beginnings; then they begin at a later word. The first texts are the same whatever number is asked for.

    Raises:
        ConfigError: no cut of them has that number of tokens.
    """
    wanted = n_tokens(tokenizer, like)
    texts: list[str] = []
    known = {like.casefold()}
    seed = in_vain = 0
    while len(texts) < number and in_vain < _IN_VAIN:
        text = _cut(tokenizer, wanted, random.Random(seed), skipped=in_vain // 4)
        if text is None and not seed:
            raise _no_such_length(wanted)
        seed += 1
        in_vain += 1
        if text is not None and text.casefold() not in known:
            known.add(text.casefold())
            texts.append(text)
            in_vain = 0
    return texts


def _cut(tokenizer: Any, wanted: int, chooser: random.Random, skipped: int) -> str | None:
    """A text of that number of tokens. skipped: words at its beginning that are left out."""
    sentences = (files("steer.experiment") / "data" / "irrelevant.txt").read_text(encoding="utf-8").splitlines()
    for _ in range(_TRIES):
        words: list[str] = []
        while n_tokens(tokenizer, " ".join(words)) < wanted:
            more = " ".join(chooser.sample(sentences, len(sentences))).split(" ")
            words += more if words else more[skipped:]
        low, high = 1, len(words)
        while low < high:  # the fewest words with enough tokens
            middle = (low + high) // 2
            low, high = (middle + 1, high) if n_tokens(tokenizer, " ".join(words[:middle])) < wanted else (low, middle)
        cut = " ".join(words[:low])
        if n_tokens(tokenizer, cut) == wanted:
            return cut
    return None


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
