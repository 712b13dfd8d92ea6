"""Pronoun shift: how far a profession moves the log-odds of him against her, compared with `person` in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.bias.factual import GENDER_TEMPLATES, PRONOUNS, check_templates
from steer.bias.items import BiasData, CoreferencePair, check_items
from steer.bias.pronouns import before_pronoun
from steer.bias.scoring import Scorer
from steer.checks import of_type
from steer.errors import ConfigError
from steer.model.estimates import Estimate, mean_of

BASELINE = "person"


@dataclass(frozen=True, eq=False)
class PronounShift:
    """Shift of the log-odds (male : female pronoun) by each profession, in nat; positive is towards the male one.

    Attributes:
        words: the professions. shifts: of each, mean over templates. magnitudes: of each, mean over templates of |shift|.
        size: mean |shift| over professions. mean: mean shift, which says whom they favour together.

    Example:
        >>> shift = steer.bias.pronoun_shift(model, ["nurse", "carpenter"], tokenizer)
        >>> dict(zip(shift.words, shift.shifts)), shift.size.value  # nat
    """

    words: tuple[str, ...]
    shifts: tuple[float, ...]
    magnitudes: tuple[float, ...]
    size: Estimate
    mean: Estimate

    def __repr__(self) -> str:
        return f"PronounShift(|shift| {self.size.written(3)} nat, {len(self.words)} words)"

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        words = [
            {"word": word, "shift": shift, "magnitude": magnitude}
            for word, shift, magnitude in zip(self.words, self.shifts, self.magnitudes, strict=True)
        ]
        return {"size": asdict(self.size), "mean": asdict(self.mean), "words": words}


def pronoun_shift(
    model: nn.Module,
    professions: Sequence[str],
    tokenizer: Any = None,
    *,
    templates: Sequence[str] = GENDER_TEMPLATES,
    baseline: str = BASELINE,
    pronouns: tuple[str, str] = PRONOUNS,
    max_tokens: int = 1024,
    progress: bool = True,
) -> PronounShift:
    """Measures the shift of the log-odds of pronouns by professions.

    Args:
        model: a causal language model, with or without a plan attached.
        professions: words, at least one.
        tokenizer: None for the one that came with the model.
        templates: texts with `{}` for the word, which stop where a pronoun comes next.
        baseline: the word that a shift is measured from.
        pronouns: male and female, with the space in front.

    Raises:
        ConfigError: no words, or templates of another form. TokenizerError: pronouns that are the same tokens. NonFiniteError.

    Example:
        >>> steer.bias.pronoun_shift(model, ["nurse", "carpenter"], tokenizer)
        PronounShift(|shift| ... nat, 2 words)
    """
    scorer = Scorer(model, tokenizer, max_tokens=max_tokens, progress=progress)
    odds = template_odds(scorer, professions, templates, baseline, pronouns)
    return shift_of(professions, odds[:, :-1] - odds[:, -1:])


def sentence_shift(
    model: nn.Module,
    data: BiasData,
    tokenizer: Any = None,
    *,
    baseline: str = BASELINE,
    max_tokens: int = 1024,
    progress: bool = True,
) -> PronounShift:
    """Measures the same shift in sentences that were not made for it: those of Winogender, cut in front of the pronoun.

    Args:
        data: what `steer.bias.load("winogender")` gave, or a part of it; a number for each occupation, mean over its sentences.
        baseline: the word that the occupation is compared with, in its place.

    Raises:
        ConfigError: other items. NonFiniteError.

    Example:
        >>> data = steer.bias.load("winogender", path="all_sentences.tsv")
        >>> steer.bias.sentence_shift(model, data, tokenizer)
    """
    check_items(data.items, CoreferencePair, "sentence shift")
    shifts = sentence_shifts(data.items, Scorer(model, tokenizer, max_tokens=max_tokens, progress=progress), baseline)
    by_word: dict[str, list[int]] = {}
    for place, item in enumerate(data.items):
        by_word.setdefault(item.occupation, []).append(place)
    signed = torch.stack([shifts[places].mean() for places in by_word.values()])
    magnitudes = torch.stack([shifts[places].abs().mean() for places in by_word.values()])
    return _result(list(by_word), signed, magnitudes)


def sentence_shifts(items: Sequence[CoreferencePair], scorer: Scorer, baseline: str = BASELINE) -> Tensor:
    """[items] shift of the log-odds of the pronouns where a sentence has its first one, by the occupation in the place of `baseline`."""
    prompts: list[str] = []
    for item in items:
        prompt = before_pronoun(item.sentences[0])
        of_baseline = re.sub(rf"\b{re.escape(item.occupation)}\b", baseline, prompt, flags=re.IGNORECASE)
        if of_baseline == prompt:
            raise _occupation_behind(item)
        prompts += [prompt, of_baseline]
    pairs = [(f" {item.pronouns[0]}", f" {item.pronouns[1]}") for item in items for _ in range(2)]
    odds = scorer.log_odds(prompts, pairs, what="sentence shift").view(-1, 2)
    return odds[:, 0] - odds[:, 1]


def template_odds(
    scorer: Scorer,
    words: Sequence[str],
    templates: Sequence[str] = GENDER_TEMPLATES,
    baseline: str = BASELINE,
    pronouns: tuple[str, str] = PRONOUNS,
) -> Tensor:
    """[templates, words + 1] log-odds of the pronouns behind each word, last the baseline, in nat. Raises as `pronoun_shift`."""
    of_type(words, (list, tuple), "the words of a pronoun shift", "pass a list of professions")
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise _no_words(words)
    check_templates(templates)
    prompts = [template.replace("{}", word) for template in templates for word in (*words, baseline)]
    return scorer.log_odds(prompts, [pronouns] * len(prompts), what="pronoun shift").view(len(templates), len(words) + 1)


def shift_of(words: Sequence[str], shifts: Tensor) -> PronounShift:
    """The result of shifts [templates, words]."""
    return _result(words, shifts.mean(0), shifts.abs().mean(0))


def _result(words: Sequence[str], shifts: Tensor, magnitudes: Tensor) -> PronounShift:
    size, mean = mean_of(magnitudes), mean_of(shifts)
    assert size is not None and mean is not None  # there are words
    return PronounShift(tuple(words), tuple(shifts.tolist()), tuple(magnitudes.tolist()), size, mean)


# ---- errors


def _no_words(words: Sequence[Any]) -> ConfigError:
    found = "none" if not words else repr(list(words))[:80]
    return ConfigError("a pronoun shift needs words", expected="at least one profession", found=found, remedy="e.g. ['nurse', 'carpenter']")


def _occupation_behind(item: CoreferencePair) -> ConfigError:
    return ConfigError(
        f"the sentence '{item.id}' has no shift",
        expected=f"'{item.occupation}' in front of its first pronoun",
        found=repr(item.sentences[0]),
        remedy="leave this item out",
    )
