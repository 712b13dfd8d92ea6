"""Search for the feature of a concept: candidates by the words at which they are on, tried as clamps on development text.

What is chosen on development text is reported on other text, and every concept and candidate that was tried is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steer.checks import finite_number, whole_number
from steer.directions.at_words import AT, marked, token_states
from steer.errors import ConfigError
from steer.experiment.metrics.concept_probability import check_words, next_word, word_tokens
from steer.experiment.pareto import effect_at
from steer.features.dictionary import Dictionary
from steer.features.operators.clamp_features import ClampFeatures
from steer.intervene import Intervention, Plan
from steer.model.tokens import Row, pad_id

SMALLEST, LARGEST = 0.25, 4.0  # doses of a trial, in multiples of a feature's maximum
_SEEN = 3  # tokens at which a candidate is on, at least


@dataclass(frozen=True)
class Trial:
    """One candidate for a concept, clamped on development text.

    Attributes:
        precision: share of the tokens where the feature is on that are words of the concept. recall: share of these where it is on.
        doses: in multiples of the feature's maximum. effects: what the log of the words' probability gained. damages: loss, nat/token.
        effect: at the damage that was allowed, straight between doses; `factor` is its exponential.
    """

    concept: str
    feature: int
    precision: float
    recall: float
    doses: tuple[float, ...]
    effects: tuple[float, ...]
    damages: tuple[float, ...]
    effect: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "factor": float(np.exp(self.effect))}


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
    def effect(self) -> float:
        return self.trials[0].effect


def find_concepts(
    model: nn.Module,
    tokenizer: Any,
    dictionary: Dictionary,
    concepts: Mapping[str, Sequence[str]],
    speaking: Sequence[Row],
    neutral: Sequence[Row],
    *,
    candidates: int = 4,
    damage: float = 0.2,
) -> list[Concept]:
    """The concepts, that whose feature does most first: how much likelier its clamp makes the words at a damage that is allowed.

    Args:
        dictionary: an autoencoder of one site, with recorded maxima.
        concepts: name -> words.
        speaking: development texts in which the words occur.
        neutral: development texts in which they do not, on which candidates are clamped.
        candidates: of each concept, by F1 of being on at its words.
        damage: loss in nat per token at which candidates are compared.

    Raises:
        ConfigError: no concepts, words that are no single tokens, or a concept at whose words no feature is on.
    """
    whole_number(candidates, "`candidates` of a concept", least=1)
    finite_number(damage, "`damage` of the search", above=0)
    if not concepts:
        raise _no_concepts()
    words = {name: word_tokens(tokenizer, check_words(listed)) for name, listed in concepts.items()}
    pad = pad_id(tokenizer)
    states, ids, places = token_states(model, [*speaking, *neutral], dictionary.reads[0], pad=pad)
    is_on = torch.cat([_is_on(dictionary, *part) for part in zip(states.split(1024), places.split(1024), strict=True)])
    everything = torch.tensor(sorted({token for of_concept in words.values() for token in of_concept.values()}))
    before, loss = next_word(model, neutral, everything[:, None], pad=pad)
    of_token = {int(token): i for i, token in enumerate(everything)}
    found = []
    for name, of_concept in words.items():
        chosen = _candidates(name, is_on, marked(ids, places, of_concept.values(), AT), candidates)
        tokens = torch.tensor(list(of_concept.values()))
        base = before[:, [of_token[int(token)] for token in tokens]].logsumexp(1)
        trials = [_trial(model, dictionary, name, *each, neutral, tokens, (base, loss), damage, pad) for each in chosen]
        found.append(Concept(name, of_concept, tuple(sorted(trials, key=lambda trial: -trial.effect))))
    return sorted(found, key=lambda concept: -concept.effect)


def _is_on(dictionary: Dictionary, states: Tensor, places: Tensor) -> Tensor:
    """[tokens, width]"""
    return dictionary.encode(states, positions=places) > 0


def _candidates(name: str, is_on: Tensor, at_word: Tensor, candidates: int) -> list[tuple[int, float, float]]:
    """Feature, precision and recall of those with the largest F1."""
    if not bool(at_word.any()):
        raise _not_spoken_of(name)
    count = is_on.sum(0)
    hits = is_on[at_word].sum(0)
    f1 = 2 * hits / (count + at_word.sum())
    f1[(count < _SEEN) | (hits == 0)] = 0
    best = f1.topk(min(candidates, len(f1)))
    chosen = [int(feature) for feature, value in zip(best.indices, best.values, strict=True) if value > 0]
    if not chosen:
        raise _no_feature(name, int(at_word.sum()))
    return [(feature, float(hits[feature] / count[feature]), float(hits[feature] / at_word.sum())) for feature in chosen]


def _trial(
    model: nn.Module,
    dictionary: Dictionary,
    concept: str,
    feature: int,
    precision: float,
    recall: float,
    neutral: Sequence[Row],
    tokens: Tensor,
    base: tuple[Tensor, Tensor],
    damage: float,
    pad: int,
) -> Trial:
    """Doubles or halves the dose until it is on both sides of the damage that is allowed."""
    measured: dict[float, tuple[float, float]] = {}
    dose = 1.0
    while SMALLEST <= dose <= LARGEST and dose not in measured:
        clamp = ClampFeatures(dictionary, [feature], to=dose, of_maximum=True)
        with Plan(Intervention(clamp, dictionary.writes[0])).attached(model):
            of_words, loss = next_word(model, neutral, tokens[None], pad=pad)
        measured[dose] = float((of_words[:, 0] - base[0]).mean()), float((loss - base[1]).mean())
        is_over = measured[dose][1] > damage
        if len({cost > damage for _, cost in measured.values()}) == 2:
            break
        dose = dose / 2 if is_over else dose * 2
    doses = sorted(measured)
    effects, damages = (tuple(measured[dose][i] for dose in doses) for i in (0, 1))
    at = max(0.0, min(damage, max(damages)))
    effect = effect_at(at, np.array(damages), np.array(effects))
    return Trial(concept, feature, precision, recall, tuple(doses), effects, damages, effect)


# ---- errors


def _no_concepts() -> ConfigError:
    return ConfigError("there is no concept to look for", expected="name: [words, ...]", found="none", remedy="e.g. film: [film, movie]")


def _not_spoken_of(name: str) -> ConfigError:
    return ConfigError(
        f"the development text does not speak of '{name}'",
        expected="texts in which its words occur",
        found="none of them",
        remedy="add such texts, or other words",
    )


def _no_feature(name: str, tokens: int) -> ConfigError:
    return ConfigError(
        f"no feature is on at the words of '{name}'",
        expected=f"a feature that is on at {_SEEN} tokens or more, one of them such a word",
        found=f"none, at {tokens} such tokens",
        remedy="add development text, or leave the concept out",
    )
