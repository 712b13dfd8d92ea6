"""Checker of generated text by rule: does an answer hold what it should, in the form that it should have?"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from steer.checks import of_type, whole_number
from steer.errors import ConfigError
from steer.experiment.metric import HIGHER, METRICS, GenerationMetric, Item
from steer.model.words import holds

_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


@METRICS.register("checker")
class Checker(GenerationMetric):
    """1 where an answer passes every check that is given, else 0; an empty answer passes none.

    Args:
        contains: a text, or several, all of which an answer must hold as whole words; case does not matter.
        regex: a pattern that must be found in the answer; `(?i)` in it ignores case, `\\A...\\Z` means all of it.
        max_words: most words, by white space.
        json: the answer must be a JSON object or array; a code fence around it is allowed.
        max_new_tokens: length of an answer. One that is cut off there fails where its end counts.

    Beside these, an item's own `expected` is a text that must be held likewise, or a list of texts one of which must be. Without any
    option each item needs one.

    Raises:
        ConfigError: an empty text, a pattern that is none, or an item without anything to check.
    """

    better = HIGHER

    def __init__(
        self,
        contains: str | Sequence[str] | None = None,
        regex: str | None = None,
        max_words: int | None = None,
        json: bool = False,
        max_new_tokens: int = 48,
    ) -> None:
        super().__init__(max_new_tokens)
        self.contains = _texts(contains, "contains of 'checker'")
        self.regex = _pattern(regex)
        if max_words is not None:
            whole_number(max_words, "max_words of 'checker'", least=1)
        self.max_words = max_words
        of_type(json, bool, "json of 'checker'", "pass true or false")
        self.json = json
        self.needs_expected = not (self.contains or self.regex or max_words or json)

    def check_item(self, item: Item) -> None:
        if "expected" not in item:
            if self.needs_expected:
                raise _nothing_expected(item)
        elif not _texts(item["expected"], f"`expected` of item '{item['id']}'"):
            raise _nothing_expected(item)

    def score(self, item: Item, text: str) -> float:
        expected = _texts(item.get("expected"), f"`expected` of item '{item['id']}'")
        passes = (
            bool(text.strip())
            and all(holds(text, part) for part in self.contains)
            and (not expected or any(holds(text, part) for part in expected))
            and (self.regex is None or self.regex.search(text) is not None)
            and (self.max_words is None or len(text.split()) <= self.max_words)
            and (not self.json or _is_json(text))
        )
        return float(passes)


def _is_json(text: str) -> bool:
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _texts(value: Any, what: str) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    of_type(texts, (list, tuple), what, "pass one text or a list of texts")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise _no_text(what, text)
    return tuple(text.strip() for text in texts)


def _pattern(regex: Any) -> re.Pattern[str] | None:
    if regex is None:
        return None
    of_type(regex, str, "regex of 'checker'", "pass a pattern as text")
    try:
        return re.compile(regex)
    except re.error as error:
        raise _bad_pattern(regex, error) from error


# ---- errors


def _no_text(what: str, value: Any) -> ConfigError:
    remedy = "put texts in quotation marks, numbers too"
    return ConfigError(f"wrong value for {what}", expected="text that is not empty", found=repr(value), remedy=remedy)


def _bad_pattern(regex: str, error: re.error) -> ConfigError:
    remedy = "correct the pattern; signs with a meaning, such as . and (, need a backslash"
    return ConfigError(
        "regex of 'checker' is no regular expression", expected="a pattern of Python's re", found=f"{regex!r}: {error}", remedy=remedy
    )


def _nothing_expected(item: Item) -> ConfigError:
    what = f"metric 'checker' has nothing to check item '{item['id']}' by"
    expected = "`expected` in the item, or one of the options contains, regex, max_words, json"
    return ConfigError(what, expected=expected, found=", ".join(key for key in item if key != "id"), remedy="give every item an `expected`")
