"""Search for the feature of a concept: those that are on at its words are tried as clamps on development text.

What is chosen on development text is reported on other text, and every concept and candidate that was tried is listed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steer.checks import finite_number, whole_number
from steer.errors import ConfigError
from steer.experiment.metrics.concept_probability import check_words, next_word, word_tokens
from steer.experiment.pareto import effect_at
from steer.features.dictionary import Dictionary
from steer.features.operators.clamp_features import ClampFeatures
from steer.features.search import FoundFeature, find_features
from steer.intervene import Intervention, Plan
from steer.model.tokens import Row, pad_id, plain

SMALLEST, LARGEST = 0.25, 4.0  # doses of a trial, in multiples of a feature's maximum
_LEAST = 3  # tokens of a concept's words in either part of the development text


@dataclass(frozen=True)
class Trial:
    """One candidate for a concept, clamped on development text.

    Attributes:
        average_precision: of the feature's value at the words of the concept, in the part of the development text by which it became a
            candidate; `average_precision_elsewhere` in the other part. See `steer.features.search`.
        doses: in multiples of the feature's maximum. effects: what the log of the words' probability gained. damages: loss, nat/token.
        effect: at the damage that was allowed, straight between doses; `factor` is its exponential. None where nothing was clamped.
    """

    concept: str
    feature: int
    average_precision: float | None
    average_precision_elsewhere: float | None
    doses: tuple[float, ...]
    effects: tuple[float, ...]
    damages: tuple[float, ...]
    effect: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "factor": None if self.effect is None else float(np.exp(self.effect))}


@dataclass(frozen=True)
class Concept:
    """A concept with the feature that was found for it.

    Attributes:
        words: those that are one token. trials: of its candidates, best first.
    """

    name: str
    words: Mapping[str, int]
    trials: tuple[Trial, ...]

    @property
    def feature(self) -> int:
        return self.trials[0].feature

    @property
    def effect(self) -> float | None:
        return self.trials[0].effect


def find_concepts(
    model: nn.Module,
    tokenizer: Any,
    dictionary: Dictionary,
    concepts: Mapping[str, Sequence[str]],
    speaking: Sequence[str],
    neutral: Sequence[str],
    *,
    candidates: int = 4,
    damage: float | None = 0.2,
) -> list[Concept]:
    """The concepts, that whose feature does most first: how much likelier its clamp makes the words at a damage that is allowed.

    Args:
        dictionary: an autoencoder of one site, with recorded maxima.
        concepts: name -> words.
        speaking: development texts in which the words occur.
        neutral: development texts in which they do not, on which candidates are clamped.
        candidates: of each concept, by the average precision of their values at its words.
        damage: loss in nat per token at which candidates are compared; None to leave them as `find_features` has them, without a clamp.

    Raises:
        ConfigError: no concepts, words that are no single tokens, or a concept at whose words no feature is on.
    """
    whole_number(candidates, "`candidates` of a concept", least=1)
    if damage is not None:
        finite_number(damage, "`damage` of the search", above=0)
    if not concepts:
        raise _no_concepts()
    words = {name: word_tokens(tokenizer, check_words(listed)) for name, listed in concepts.items()}
    texts = [*speaking, *neutral]
    random.Random(0).shuffle(texts)  # a part is kept for the report
    features = find_features(
        model, dictionary, {name: list(concepts[name]) for name in words}, tokenizer=tokenizer, texts=texts, top=candidates, least=_LEAST
    )
    pad, rows = pad_id(tokenizer), [plain(tokenizer, text) for text in neutral]
    found = []
    for name, of_concept in words.items():
        tokens = torch.tensor([list(of_concept.values())])
        if not (candidates_of := features.of(name)):
            raise _no_feature(name)
        if damage is None:
            trials = [_not_clamped(candidate) for candidate in candidates_of]
        else:
            base = next_word(model, rows, tokens, pad=pad)
            trials = [_trial(model, dictionary, candidate, rows, tokens, base, damage, pad) for candidate in candidates_of]
        found.append(Concept(name, of_concept, tuple(sorted(trials, key=_most_effect_first))))
    return sorted(found, key=_most_effect_first)


def _most_effect_first(tried: Trial | Concept) -> float:
    return 0.0 if tried.effect is None else -tried.effect


def _trial(
    model: nn.Module,
    dictionary: Dictionary,
    candidate: FoundFeature,
    rows: Sequence[Row],
    tokens: Tensor,
    base: tuple[Tensor, Tensor],
    damage: float,
    pad: int,
) -> Trial:
    """Doubles or halves the dose until it is on both sides of the damage that is allowed."""
    measured: dict[float, tuple[float, float]] = {}
    dose = 1.0
    while SMALLEST <= dose <= LARGEST and dose not in measured:
        clamp = ClampFeatures(dictionary, [candidate.feature], to=dose, of_maximum=True)
        with Plan(Intervention(clamp, dictionary.writes[0])).attached(model):
            of_words, loss = next_word(model, rows, tokens, pad=pad)
        measured[dose] = float((of_words - base[0]).mean()), float((loss - base[1]).mean())
        is_over = measured[dose][1] > damage
        if len({cost > damage for _, cost in measured.values()}) == 2:
            break
        dose = dose / 2 if is_over else dose * 2
    doses = sorted(measured)
    effects, damages = (tuple(measured[dose][i] for dose in doses) for i in (0, 1))
    at = max(0.0, min(damage, max(damages)))
    effect = effect_at(at, np.array(damages), np.array(effects))
    return replace(_not_clamped(candidate), doses=tuple(doses), effects=effects, damages=damages, effect=effect)


def _not_clamped(candidate: FoundFeature) -> Trial:
    here, elsewhere = (scores.get("average_precision") for scores in (candidate.development, candidate.report))
    return Trial(candidate.concept, candidate.feature, here, elsewhere, (), (), (), None)


# ---- errors


def _no_concepts() -> ConfigError:
    return ConfigError("there is no concept to look for", expected="name: [words, ...]", found="none", remedy="e.g. film: [film, movie]")


def _no_feature(name: str) -> ConfigError:
    return ConfigError(
        f"no feature is on at the words of '{name}'",
        expected="a feature that is on at some of them",
        found="none",
        remedy="add development text, or leave the concept out",
    )
