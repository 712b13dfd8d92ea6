"""Counterfactual text: words of one group are swapped for those of the other, for data augmentation (CDA; Zhao et al. 2018, arXiv
1804.06876; Lu et al. 2018, arXiv 1807.11714).

"Her" is "him" or "his", and "his" is "her" or "hers". The rule: where another word follows directly, none of `NO_NOUN_PHRASE`, either
stands before a noun and is swapped for the other one ("her book", "his book"); anywhere else "her" becomes "him" ("saw her yesterday",
"saw her."), and "his" becomes "hers" ("it is his."). That is wrong where a noun follows an object ("gave her books"),
and where one of the list begins what is possessed ("his then wife"). Names are not swapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from steer.bias.words import SELECT, TEST
from steer.checks import of_type, one_of
from steer.errors import ConfigError, ContrastError

Rows = TypeVar("Rows", str, Mapping[str, object])

SIDES = ("two", "one")
KEYS = ("prompt", "answer", "text")  # of a row, what is text to swap

SWAPS = (
    *SELECT,
    *TEST,
    *(
        (male, female)
        for male, female in (
            pair.split("/")
            for pair in "men/women boys/girls kings/queens sons/daughters brothers/sisters husbands/wives gentlemen/ladies fathers/mothers "
            "actors/actresses uncles/aunts princes/princesses grandfathers/grandmothers nephews/nieces lads/lasses grooms/brides dads/moms "
            "businessmen/businesswomen policemen/policewomen waiters/waitresses daddy/mommy grandpa/grandma male/female males/females "
            "boyfriend/girlfriend boyfriends/girlfriends spokesman/spokeswoman chairman/chairwoman congressman/congresswoman host/hostess "
            "heir/heiress hero/heroine schoolboy/schoolgirl mr/mrs sir/madam he/she himself/herself".split()
        )
    ),
)

# words behind an object: none of them begins what a possessive stands before
NO_NOUN_PHRASE = frozenset(
    "a about across after again against all alone along always am an and another any are around as at away be because been before behind "
    "being below between both but by can could did do does down during each either every for from had has have he here how i if in inside "
    "into is it its just may me might must my never no not now of off often on or our out over shall she should since so some that the "
    "their them then there these they this those through till to today together tomorrow tonight too toward towards under until up us was "
    "we were what when where which while who whom whose why will with within without would yesterday yet you your".split()
)

_WORD = re.compile(r"[A-Za-z]+")
_NEXT = re.compile(r"[ \t\n]+([A-Za-z]+)")


class Swap:
    """Swaps the words of two groups in a text, both ways at once, and keeps capitals.

    Args:
        pairs: (word, word), each word in one pair alone. Without them the gender words of this file, with "him", "his", "her" and "hers" by
            the rule above.

    Raises:
        ConfigError: what is no pair of words, or a word in two pairs.

    Example:
        >>> Swap()("She gave her brother HIS book, and thanked him.")
        'He gave his sister HER book, and thanked her.'
    """

    def __init__(self, pairs: Iterable[tuple[str, str]] | None = None) -> None:
        self.has_pronouns = pairs is None
        self.partners: dict[str, str] = {}
        for pair in SWAPS if pairs is None else list(pairs):
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(w, str) and _WORD.fullmatch(w) for w in pair):
                raise _no_words(pair)
            first, second = (word.lower() for word in pair)
            for word, partner in ((first, second), (second, first)):
                if self.partners.setdefault(word, partner) != partner or first == second:
                    raise _two_partners(word, self.partners[word], partner)
        if not self.partners:
            raise _no_words(None)

    def __call__(self, text: str) -> str:
        return _WORD.sub(lambda match: _in_the_case_of(match.group(), self._partner(match)), text)

    def _partner(self, match: re.Match[str]) -> str:
        """What a word is swapped for, in small letters; itself when it is not swapped."""
        word = match.group().lower()
        if self.has_pronouns and word in ("him", "her", "his", "hers"):
            if word in ("him", "hers"):
                return {"him": "her", "hers": "his"}[word]
            follows = _NEXT.match(match.string, match.end())
            before_noun = follows is not None and follows.group(1).lower() not in NO_NOUN_PHRASE
            return {"her": ("him", "his"), "his": ("hers", "her")}[word][before_noun]
        return self.partners.get(word, word)


def _in_the_case_of(model: str, word: str) -> str:
    if word == model.lower():
        return model
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word.capitalize() if model[0].isupper() else word


def counterfactuals(rows: Sequence[Rows], pairs: Iterable[tuple[str, str]] | None = None) -> list[Rows]:
    """The swapped form of each row that has a word to swap, and of no other; `more` of an experiment's treatment `data`.

    Args:
        rows: texts, or mappings with text under `prompt`, `answer` or `text`; what else they hold is kept.
        pairs: as of `Swap`.

    Raises:
        ConfigError: rows without text. ContrastError: no row has a word to swap.

    Example:
        >>> counterfactuals(["The nurse lost her keys.", "It rained."])
        ['The nurse lost his keys.']
    """
    swapped = [new for row, new in zip(rows, _swapped(rows, pairs), strict=True) if new != row]
    if not swapped:
        raise _nothing_to_swap(len(rows))
    return swapped


def augmented(rows: Sequence[Rows], *, sided: str = "two", pairs: Iterable[tuple[str, str]] | None = None) -> list[Rows]:
    """Counterfactual data augmentation: rows to train on, in which what is said of one group is said of the other.

    Args:
        rows, pairs: as of `counterfactuals`.
        sided: `two`, every row that has a word to swap is followed by its swapped form; `one`, it is replaced by that.

    Raises:
        ConfigError: another `sided`, or rows without text. ContrastError: no row has a word to swap.

    Example:
        >>> augmented(["The nurse lost her keys.", "It rained."])
        ['The nurse lost her keys.', 'The nurse lost his keys.', 'It rained.']
    """
    one_of(sided, SIDES, "`sided` of counterfactual augmentation")
    made: list[Rows] = []
    for row, new in zip(rows, _swapped(rows, pairs), strict=True):
        made += [row] if new == row else [row, new] if sided == "two" else [new]
    if made == list(rows):
        raise _nothing_to_swap(len(rows))
    return made


def _swapped(rows: Sequence[Rows], pairs: Iterable[tuple[str, str]] | None) -> list[Rows]:
    of_type(rows, (list, tuple), "the rows of counterfactual augmentation", "pass a list of texts, or of mappings with text")
    swap = Swap(pairs)
    return [swap(row) if isinstance(row, str) else _swapped_mapping(row, i, swap) for i, row in enumerate(rows)]


def _swapped_mapping(row: Mapping[str, object], index: int, swap: Swap) -> dict[str, object]:
    texts = {key: row[key] for key in KEYS if isinstance(row, Mapping) and isinstance(row.get(key), str)}
    if not texts:
        raise _no_text(row, index)
    return {**row, **{key: swap(str(text)) for key, text in texts.items()}}


# ---- errors


def _no_words(pair: object) -> ConfigError:
    return ConfigError(
        "counterfactual augmentation has no words to swap" if pair is None else "what is to be swapped is no pair of words",
        expected="(word, word), of letters alone",
        found="none" if pair is None else repr(pair)[:60],
        remedy="e.g. pairs=[('king', 'queen')]; leave `pairs` out for gender",
    )


def _two_partners(word: str, partner: str, other: str) -> ConfigError:
    return ConfigError(
        f"'{word}' would be swapped for two words, or for itself",
        expected="every word in one pair",
        found=f"{partner} and {other}",
        remedy="take it out of all pairs but one",
    )


def _no_text(row: object, index: int) -> ConfigError:
    return ConfigError(
        f"row {index} of counterfactual augmentation has no text",
        expected=f"text, or a mapping with text under one of {', '.join(KEYS)}",
        found=repr(row)[:60],
        remedy="augment texts before they are tokenised",
    )


def _nothing_to_swap(rows: int) -> ContrastError:
    return ContrastError(
        "counterfactual augmentation changes nothing",
        expected="rows with words of one of the groups",
        found=f"none in {rows} rows",
        remedy="give text that speaks of people, or other pairs",
    )
