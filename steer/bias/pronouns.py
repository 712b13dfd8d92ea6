"""Pronouns of English by gender, and where two sentences differ by them alone."""

from __future__ import annotations

import re

MALE = ("he", "him", "his", "himself")
FEMALE = ("she", "her", "hers", "herself")
_ANY = re.compile(rf"\b({'|'.join((*MALE, *FEMALE))})\b", re.IGNORECASE)


def pronouns_of(text: str) -> list[str]:
    """The gendered pronouns of a text, in order, in lower case."""
    return [found.lower() for found in _ANY.findall(text)]


def before_pronoun(text: str) -> str:
    """The text in front of its first gendered pronoun, without the space; all of it where there is none."""
    found = _ANY.search(text)
    return text[: found.start()].rstrip() if found else text


def differ_by_pronouns(a: str, b: str) -> bool:
    """Two texts are alike but for gendered pronouns, of which the first differs."""
    pronouns = pronouns_of(a), pronouns_of(b)
    return _ANY.sub("_", a).lower() == _ANY.sub("_", b).lower() and bool(pronouns[0]) and pronouns[0][0] != pronouns[1][0]
