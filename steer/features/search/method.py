"""Feature searches: what makes a feature one of a concept. One file each in `steer.features.search.methods`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.features.dictionary import Dictionary
from steer.features.search.texts import MarkedTexts
from steer.lens.labelled import LabelledTexts
from steer.model.tokens import Row
from steer.registry import Registry

Scores = dict[str, Tensor]  # column -> [chosen features]


@dataclass(frozen=True, eq=False)
class SearchTask:
    """What a search scores features by.

    Attributes:
        model, tokenizer: of the dictionary.
        words: of each concept that is given by words. labelled: texts of each other concept.
        texts: running text with these words marked; None where nobody gave any.
        features: [chosen] of each concept, those that are scored; all features where it is None.
        maxima: [width] the largest value of each feature, as far as it is known.
        progress: label of progress bars, None for none.

    Example:
        >>> task = steer.features.search.SearchTask(model, dictionary, tokenizer, {"animals": ["cat", "dog"]}, {}, None)
        >>> task.concepts, task.ids("animals")
    """

    model: nn.Module
    dictionary: Dictionary
    tokenizer: Any
    words: Mapping[str, Sequence[str]]
    labelled: Mapping[str, LabelledTexts]
    texts: MarkedTexts | None
    features: Mapping[str, Tensor] | None = None
    maxima: Tensor | None = None
    progress: str | None = None

    @property
    def concepts(self) -> list[str]:
        """The concepts, those of words first."""
        return [*self.words, *self.labelled]

    def with_features(self, features: Mapping[str, Tensor], maxima: Tensor | None) -> SearchTask:
        """The same for chosen features, of which the largest values are known. features, maxima: as of the class."""
        return replace(self, features=features, maxima=maxima)

    def of_words(self) -> SearchTask:
        """The same for the concepts of words alone."""
        return replace(self, labelled={})

    @property
    def rows(self) -> tuple[Row, ...]:
        """All texts, running and labelled."""
        running = () if self.texts is None else self.texts.rows
        return (*running, *(row for texts in self.labelled.values() for row in texts.rows))

    def scored(self) -> Tensor | None:
        """[chosen] every feature that any concept has scored, in order; None for all of the dictionary."""
        if self.features is None:
            return None
        return torch.cat([*self.features.values(), torch.empty(0, dtype=torch.long)]).unique()

    def ids(self, concept: str) -> Tensor:
        """[n] tokens that say a word of the concept, of words that are one token, growing.

        Raises:
            ConfigError: no word is, or the concept is given by texts.
        """
        found = set()
        for word in self.words.get(concept, ()):
            for form in (f" {word}", word):
                ids = self.tokenizer(form, add_special_tokens=False).input_ids
                if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                    found.add(ids[0])
        if not found:
            raise _no_tokens(concept, self.words.get(concept))
        return torch.tensor(sorted(found))


class FeatureSearch:
    """A way to score features.

    Attributes:
        name: under which it is registered.
        columns: of its scores, in the order in which they are shown. The first one ranks features, larger is better.
        needs: what it cannot do without: `texts` (running text or labelled texts), `words`.

    Example:
        >>> from steer.features.search import SEARCHES, FeatureSearch
        >>> @SEARCHES.register("longest_row")
        ... class LongestRow(FeatureSearch):
        ...     columns, needs = ("length",), ()
        ...
        ...     def scores(self, task):
        ...         lengths = task.dictionary.decoder_rows(torch.arange(task.dictionary.width)).norm(dim=-1)  # [width]
        ...         return {concept: {"length": lengths} for concept in task.concepts}
        >>> "longest_row" in SEARCHES
        True
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()

    def scores(self, task: SearchTask) -> dict[str, Scores]:
        """Of each concept, a tensor for each column: [width], or [chosen] of `task.features`. NaN for a feature without a score."""
        raise NotImplementedError


SEARCHES: Registry[type[FeatureSearch]] = Registry(
    "feature search", "steer.features.search.methods", "steer.feature_searches", subclass_of=FeatureSearch
)


# ---- errors


def _no_tokens(concept: str, words: Sequence[str] | None) -> ConfigError:
    return ConfigError(
        f"the concept '{concept}' has no word that is one token, which a search by what the model says needs",
        expected="a concept of words, at least one of which is a single token",
        found="labelled texts" if words is None else ", ".join(words)[:120],
        remedy="add shorter words, or search by='activation'",
    )
