"""The grammar of plans as text: from characters to terms. See `steer.directions.text`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from steer.errors import ConfigError, SteerError, did_you_mean
from steer.intervene import Operator, Scope
from steer.model.site import Site
from steer.model.sites import Sites

GRAMMAR = '[number] [operator] name or operator(name, word=value) [":" site] ["@" scope] ["?" gate] ["^"], joined by + and -'
_VALUE = re.compile(r'\[[^\[\]]*\]|"[^"]*"|[^\s,()\[\]]+')
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?=\s)")
WORD = re.compile(r"[^\W\d]\w*")
# layers.-1.output and layers.4-9.output have signs of their own
_ONE_SITE = r"(?:module:[^\s@?^]+?:(?:input|output)|(?:layers\.\d+-\d+(?=\.)|[^\s@?^+\-,]|(?<=\.)-)+)"
_SITE = re.compile(f"{_ONE_SITE}(?:,{_ONE_SITE})*")
_SCOPE = re.compile(r"(?:[^\[\]+\-?^]|\[[^\[\]]*\])*")  # signs count in brackets only


@dataclass
class Term:
    """One term, as written, and where each of its parts begins."""

    strength: float
    operator: str
    name: str
    site: str | None
    scope: str
    gate: str | None
    preserve_norm: bool
    at: dict[str, int]
    words: dict[str, Any] | None = None  # of an operator that is made of more than a name


class Reader:
    """Reads the terms of one text, and says where in it a mistake is."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._scopes: dict[str, Scope] = {}
        self.edits: dict[tuple[str, str, str | None, str], tuple[Operator, Site | Sites]] = {}  # made once for all terms that name them

    def fail(self, what: str, expected: str, remedy: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        raise ConfigError(
            f"{what}, at character {at + 1} of '{self.text}'",
            expected=expected,
            found=repr(self.text[at : at + 24]) if self.text[at:] else "the end of the text",
            remedy=remedy,
        )

    @contextmanager
    def located(self, at: int) -> Iterator[None]:
        """Adds to an error where in the text its cause is."""
        try:
            yield
        except SteerError as error:
            what = f"{error.what}, at character {at + 1} of '{self.text}'"
            raise ConfigError(what, expected=error.expected, found=error.found, remedy=error.remedy) from error

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """What the pattern matches here, spaces before and after it skipped; None for no match."""
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None or not match[0]:
            return None
        self.at = match.end()
        self.skip()
        return match[0]

    def skip(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def mark(self, sign: str) -> bool:
        """Takes a single character if it is the next one."""
        if not self.text.startswith(sign, self.at):
            return False
        self.at += 1
        self.skip()
        return True

    def required(self, pattern: re.Pattern[str], what: str, remedy: str) -> str:
        return self.take(pattern) or self.fail(f"no {what}", what, remedy)

    def known(self, what: str, word: str, known: Iterable[str], at: int) -> None:
        if word not in known:
            expected = f"one of {', '.join(known)}" if known else f"a text without them: no {what} was given"
            remedy = did_you_mean(word, known) or f"correct the name, or give that {what} too"
            self.fail(f"no {what} is called '{word}'", expected, remedy, at)

    def scope(self, text: str) -> Scope:
        """The scope, read once for all terms that name it."""
        if text not in self._scopes:
            self._scopes[text] = Scope.parse(text)
        return self._scopes[text]

    def terms(self) -> list[Term]:
        self.skip()
        terms = [self.term(self.sign() or 1)]
        while self.at < len(self.text):
            sign = self.sign()
            if sign is None:
                self.fail("the plan cannot be read", GRAMMAR, "put a + or - between terms, and a space between a number and a word")
            terms.append(self.term(sign))
        return terms

    def sign(self) -> int | None:
        return 1 if self.mark("+") else -1 if self.mark("-") else None

    def term(self, sign: int) -> Term:
        at = {"number": self.at}
        number = self.take(_NUMBER)
        at["name"] = self.at
        name = self.required(WORD, "name of a direction", "write e.g. '0.4 warm@response', with a space after a number")
        operator = "add"
        at["operator"] = at["name"]
        second = self.at
        words = None
        if self.mark("("):
            operator = name
            at["name"] = self.at
            name, words = self.called()
        elif word := self.take(WORD):
            operator = name
            name = word
            at["name"] = second
        site = None
        scope = "all"
        gate = None
        if self.mark(":"):
            at["site"] = self.at
            site = self.required(_SITE, "site", "write e.g. ':layers.12.output', or leave the ':' out")
        if self.mark("@"):
            at["scope"] = self.at
            scope = self.required(_SCOPE, "scope", "write e.g. '@response', or leave the '@' out").strip()
        if self.mark("?"):
            at["gate"] = self.at
            gate = self.required(WORD, "name of a gate", "write e.g. '?harmful', or leave the '?' out")
        return Term(sign * float(number or 1), operator, name, site, scope, gate, self.mark("^"), at, words)

    def called(self) -> tuple[str, dict[str, Any]]:
        """Name and words between the brackets of an operator."""
        name = self.required(WORD, "name", "write e.g. 'clamp(sae, feature=5, to=3)'")
        words: dict[str, Any] = {}
        while self.mark(","):
            word = self.required(WORD, "word and its value", "write e.g. 'feature=5'")
            if word in words:
                self.fail(f"'{word}' is said twice", "every word once", "leave one of the two out")
            if not self.mark("="):
                self.fail(f"'{word}' has no value", f"'{word}=' and a value", "write e.g. 'feature=5'")
            start = self.at
            value = self.required(_VALUE, "value", "write a number, true, or a list such as [5,7]")
            try:
                words[word] = json.loads(value)
            except ValueError:
                self.fail(f"'{word}' has no value that can be read", "a number, true, false, or a list such as [5,7]", "e.g. 0.5", start)
        if not self.mark(")"):
            self.fail("a bracket is not closed", "a comma and a word, or ')'", "write e.g. 'clamp(sae, feature=5, to=3)'")
        return name, words
