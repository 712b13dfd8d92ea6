"""Features of an experiment: chosen by their numbers, or found for a concept on development text, with the mean differences beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.directions.at_words import difference_at_words
from steer.errors import ConfigError
from steer.experiment.concept_search import Concept, find_concepts
from steer.features.dictionary import Dictionary
from steer.features.statistics import feature_statistics
from steer.model.tokens import Row, plain


class ExperimentFeatures:
    """What arms of the treatment `feature` edit.

    Args:
        dictionary: an autoencoder of one site.
        chosen: numbers of the features.
        concept: that they stand for, with its words; None for features that were chosen by number alone.
        tried: all concepts that were tried, best first.
        rows: development texts.
    """

    def __init__(
        self,
        model: nn.Module,
        dictionary: Dictionary,
        chosen: Sequence[int],
        concept: Concept | None = None,
        tried: Sequence[Concept] = (),
        rows: Sequence[Row] = (),
    ) -> None:
        self.model = model
        self.dictionary = dictionary
        self.chosen = list(chosen)
        self.concept = concept
        self.tried = list(tried)
        self.rows = list(rows)

    @classmethod
    def found(
        cls,
        model: nn.Module,
        tokenizer: Any,
        dictionary: Dictionary,
        concepts: Mapping[str, Sequence[str]],
        speaking: Sequence[str],
        neutral: Sequence[str],
        *,
        rank: int | None = 1,
        candidates: int = 4,
        damage: float | None = 0.2,
    ) -> ExperimentFeatures:
        """The feature of the concept at a rank among all that are tried; all candidates when None. Raises as `find_concepts`."""
        if rank is not None:
            whole_number(rank, "`rank` of a concept", least=1)
            if rank > len(concepts):
                raise _no_such_rank(rank, len(concepts))
        rows = [plain(tokenizer, text) for text in (*speaking, *neutral)]
        record_statistics(model, dictionary, rows)
        tried = find_concepts(model, tokenizer, dictionary, concepts, speaking, neutral, candidates=candidates, damage=damage)
        if rank is None:
            features = dict.fromkeys(trial.feature for concept in tried for trial in concept.trials)
            return cls(model, dictionary, list(features), None, tried, rows)
        concept = tried[rank - 1]
        return cls(model, dictionary, [concept.feature], concept, tried, rows)

    @cached_property
    def length(self) -> float:
        """Length of the change when the features go from 0 to their maxima."""
        if self.dictionary.maxima is None:
            raise _no_maxima()
        maxima = self.dictionary.maxima[torch.tensor(self.chosen)].float()
        return float((maxima @ self.dictionary.decoder_rows(self.chosen)).norm())

    def difference(self, where: str) -> Tensor:
        """[width] mean difference `at` or `before` the words of the concept, as long as the features at their maxima."""
        if self.concept is None:
            raise _no_words(where)
        if where not in self._differences:
            words, keep = list(self.concept.words.values()), self.dictionary.untrained.trained_on
            self._differences[where] = difference_at_words(self.model, self.rows, words, self.dictionary.writes[0], where=where, keep=keep)
        vector = self._differences[where]
        return vector / vector.norm() * self.length

    @cached_property
    def _differences(self) -> dict[str, Tensor]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        """What is said of them in metrics.json."""
        density = self.dictionary.density
        return {
            "dictionary": self.dictionary.source.place,
            "site": str(self.dictionary.writes[0]),
            "features": self.chosen,
            "maxima": None if self.dictionary.maxima is None else [float(self.dictionary.maxima[i]) for i in self.chosen],
            "density": None if density is None else [float(density[i]) for i in self.chosen],
            "concept": None if self.concept is None else self.concept.name,
            "words": [] if self.concept is None else list(self.concept.words),
            "tried": [trial.to_dict() for concept in self.tried for trial in concept.trials],
        }


def record_statistics(model: nn.Module, dictionary: Dictionary, rows: Sequence[Row]) -> None:
    """Measures maxima and densities of features on development text where nobody recorded them, as of published dictionaries."""
    if dictionary.maxima is None or dictionary.density is None:
        statistics = feature_statistics(model, dictionary, rows)
        dictionary.maxima = statistics.maximum if dictionary.maxima is None else dictionary.maxima
        dictionary.density = statistics.density if dictionary.density is None else dictionary.density


# ---- errors


def _no_such_rank(rank: int, concepts: int) -> ConfigError:
    return ConfigError("there are not so many concepts", expected=f"a rank of 1 to {concepts}", found=rank, remedy="add concepts")


def _no_maxima() -> ConfigError:
    return ConfigError(
        "nobody recorded the largest values of this dictionary's features",
        expected="`dictionary.maxima`, in which doses count",
        found="none",
        remedy="train it with `steer features train`, or set dictionary.maxima from steer.features.feature_statistics and save it",
    )


def _no_words(where: str) -> ConfigError:
    return ConfigError(
        f"there is no mean difference {where} the words of features that were chosen by number",
        expected="experiment.features.concepts, whose words mark the tokens",
        found="experiment.features.chosen alone",
        remedy="give the concept and its words, or leave this arm out",
    )
