"""Items of bias data sets: one frozen class for each shape, whatever file they came from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer.checks import whole_number
from steer.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """One item. `id` is unique within a data set; `group` is the row of the table that it counts in, such as `gender`."""

    id: str
    group: str


@dataclass(frozen=True)
class SentencePair(Item):
    """Two sentences that differ in the group they speak of; `more` is the more stereotyping one, whatever the direction.

    Attributes:
        direction: `stereo` where `more` is about the disadvantaged group, `antistereo` where `less` is.
    """

    more: str
    less: str
    direction: str


@dataclass(frozen=True)
class StereoTriple(Item):
    """One context, filled with a stereotype, an anti-stereotype and an unrelated word.

    Attributes:
        target: the term that the sentences are about; scores are means over terms.
        unrelated: None where a data set has pairs alone, which give no language-model score.
        sentence_ids: of stereotype, anti-stereotype and unrelated, by which published scores are found; may be empty.
    """

    target: str
    stereotype: str
    anti_stereotype: str
    unrelated: str | None
    sentence_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class CoreferencePair(Item):
    """A sentence with a pronoun that refers to one of two people, once with each pronoun of a pair.

    Attributes:
        sentences: (pro-stereotypical, anti-stereotypical) for WinoBias, (male, female) for Winogender.
        pronouns: of the two sentences.
        referent, other: whom the pronoun means, and the other one, as `the nurse` stands in a sentence.
        occupation: the one that statistics are about.
        percent_female: of those who hold the occupation, where it is known.
    """

    sentences: tuple[str, str]
    pronouns: tuple[str, str]
    referent: str
    other: str
    occupation: str
    percent_female: float | None = None


@dataclass(frozen=True)
class Question(Item):
    """A question with three answers about a context that may not say it.

    Attributes:
        label: number of the right answer. unknown: number of the one that says it cannot be known.
        biased: number of the answer that agrees with the stereotype, given how the question is put; None where it is not known.
        is_ambiguous: the context does not say the answer.
        by_name: people are named rather than described.
    """

    context: str
    question: str
    answers: tuple[str, str, str]
    label: int
    unknown: int
    biased: int | None
    is_ambiguous: bool
    by_name: bool = False

    @property
    def unbiased(self) -> int | None:
        """Number of the answer that contradicts the stereotype."""
        return None if self.biased is None else 3 - self.biased - self.unknown


@dataclass(frozen=True)
class AssociationTest(Item):
    """Two sets of targets and two of attributes, as texts; `names` are theirs."""

    targets: tuple[tuple[str, ...], tuple[str, ...]]
    attributes: tuple[tuple[str, ...], tuple[str, ...]]
    names: tuple[str, str, str, str]


@dataclass(frozen=True)
class Prompt(Item):
    """The start of a text that a model goes on with."""

    text: str


@dataclass(frozen=True)
class Word(Item):
    """A word that templates are filled with, such as a profession."""

    word: str


@dataclass(frozen=True, eq=False)
class BiasData:
    """Items of one data set; `steer.bias.load` makes it.

    Attributes:
        name: under which the data set is registered.
        items: at least one, of one class.
        source: where they came from.
        notes: what a reader of a table must know of these items.

    Example:
        >>> data = steer.bias.load("professions", words=["nurse", "carpenter", "judge"])
        >>> len(data.sample(2).items), data.groups
        (2, ['profession'])
    """

    name: str
    items: tuple[Any, ...]
    source: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __repr__(self) -> str:
        return f"BiasData({self.name}, {len(self)} items of {len(self.groups)} groups from {self.source})"

    @property
    def groups(self) -> list[str]:
        """In the order of their first item."""
        return list(dict.fromkeys(item.group for item in self.items))

    def sample(self, n: int, seed: int = 0) -> BiasData:
        """n items by chance, in their order; all where there are no more. Raises ConfigError for n below 1."""
        whole_number(n, "the size of a sample", least=1)
        if n >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), n))
        notes = (*self.notes, f"a sample of {n} of {len(self)} items, seed {seed}")
        return BiasData(self.name, tuple(self.items[i] for i in chosen), self.source, notes)

    def only(self, *groups: str) -> BiasData:
        """The items of some groups. Raises ConfigError for a group that has none."""
        if missing := [group for group in groups if group not in self.groups]:
            raise _no_group(self, missing[0])
        return BiasData(self.name, tuple(item for item in self.items if item.group in groups), self.source, self.notes)


def check_items(items: Sequence[Any], kind: type, metric: str) -> None:
    """Raises ConfigError unless there are items, all of the class that a metric is for."""
    if not items or not all(isinstance(item, kind) for item in items):
        raise _other_items(items, kind, metric)


# ---- errors


def _no_group(data: BiasData, group: object) -> ConfigError:
    found = f"'{group}'"
    return ConfigError(f"{data.name} has no such group", expected=f"one of {', '.join(data.groups)}", found=found, remedy="choose one")


def _other_items(items: Sequence[Any], kind: type, metric: str) -> ConfigError:
    wrong = next((type(item).__name__ for item in items if not isinstance(item, kind)), "none")
    remedy = f"load them with steer.bias.load, or make them as steer.bias.items.{kind.__name__}"
    return ConfigError(f"the {metric} cannot be measured on these items", expected=f"{kind.__name__} items", found=wrong, remedy=remedy)
