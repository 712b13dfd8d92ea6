"""Factual gender: that a mother is a woman, which a model has to keep knowing when its stereotypes are taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from steer.bias.scoring import Scorer
from steer.bias.words import TEST
from steer.checks import of_type
from steer.errors import ConfigError
from steer.model.estimates import Estimate, mean_of, percentage_of

# GSS1 and GSS2 of 2506.05166: the shift of professions is measured in the same sentences, so that both numbers can be compared
GENDER_TEMPLATES = ("The {} did a mistake, and everyone scolded", "The {} did a miracle, and everyone praised")
PRONOUNS = (" him", " her")


@dataclass(frozen=True, eq=False)
class FactualGender:
    """What a model knows of factual gender.

    Attributes:
        gap: mean over word pairs of the log-odds (male : female pronoun) behind the male word, less those behind the female one, in nat.
        accuracy: percent of words behind which the pronoun of their gender is the likelier.
        pairs: (male, female). gaps: of each pair, in nat.

    Example:
        >>> known = steer.bias.factual_gender(model, tokenizer, pairs=[("father", "mother"), ("uncle", "aunt")])
        >>> known.gap.value, known.accuracy.value  # nat, percent
    """

    gap: Estimate
    accuracy: Estimate
    pairs: tuple[tuple[str, str], ...]
    gaps: tuple[float, ...]

    def __repr__(self) -> str:
        return f"FactualGender(gap {self.gap.written(2)} nat, accuracy {self.accuracy.written(1)} %, {len(self.pairs)} word pairs)"

    def values(self) -> dict[str, Estimate]:
        """The columns that every bias table has."""
        return {"factual gap": self.gap, "factual accuracy": self.accuracy}

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        pairs = [{"male": male, "female": female, "gap": gap} for (male, female), gap in zip(self.pairs, self.gaps, strict=True)]
        return {"gap": asdict(self.gap), "accuracy": asdict(self.accuracy), "pairs": pairs}


def factual_gender(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    pairs: Sequence[tuple[str, str]] = TEST,
    templates: Sequence[str] = GENDER_TEMPLATES,
    pronouns: tuple[str, str] = PRONOUNS,
    max_tokens: int = 1024,
    progress: bool = True,
) -> FactualGender:
    """Measures what a model knows of factual gender: gap in log-odds, and accuracy.

    Args:
        model: a causal language model, with or without a plan attached.
        tokenizer: None for the one that came with the model.
        pairs: (male, female) words. `steer.bias.words.TEST` by default; whatever was fitted or chosen must have seen none of them, for
            which `steer.bias.words.SELECT` is the other half.
        templates: texts with `{}` for the word, which stop where a pronoun comes next.
        pronouns: male and female, with the space in front.

    Raises:
        ConfigError: pairs or templates of another form. TokenizerError: pronouns that are the same tokens. NonFiniteError.

    Example:
        >>> steer.bias.factual_gender(model, tokenizer)
        FactualGender(gap ... nat, accuracy ... %, 16 word pairs)
    """
    return factual_gender_of(Scorer(model, tokenizer, max_tokens=max_tokens, progress=progress), pairs, templates, pronouns)


def factual_gender_of(
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]] = TEST,
    templates: Sequence[str] = GENDER_TEMPLATES,
    pronouns: tuple[str, str] = PRONOUNS,
) -> FactualGender:
    """`factual_gender` with a scorer that is there."""
    _check_pairs(pairs)
    check_templates(templates)
    prompts = [template.replace("{}", word) for template in templates for pair in pairs for word in pair]
    odds = scorer.log_odds(prompts, [pronouns] * len(prompts), what="factual gender")
    odds = odds.view(len(templates), len(pairs), 2)  # male, female
    gaps = (odds[..., 0] - odds[..., 1]).mean(0)  # [pairs]
    right = torch.stack([odds[..., 0] > 0, odds[..., 1] < 0], -1).double().mean(0)  # [pairs, 2] over templates
    gap, accuracy = mean_of(gaps), percentage_of(right.flatten())
    assert gap is not None and accuracy is not None  # there are pairs
    return FactualGender(gap, accuracy, tuple((male, female) for male, female in pairs), tuple(gaps.tolist()))


def check_templates(templates: Sequence[str]) -> None:
    """Raises ConfigError unless these are texts with one `{}` each."""
    of_type(templates, (list, tuple), "the templates", "pass a list of texts with {} for the word")
    if not templates or not all(isinstance(text, str) and text.count("{}") == 1 for text in templates):
        raise _no_template(templates)


def _check_pairs(pairs: Any) -> None:
    of_type(pairs, (list, tuple), "the word pairs", "pass a list of (male, female)")
    if not pairs or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(w, str) and w for w in pair) for pair in pairs
    ):
        raise _no_pairs(pairs)


# ---- errors


def _no_pairs(pairs: Sequence[Any]) -> ConfigError:
    found = "none" if not pairs else repr(pairs)[:80]
    return ConfigError(
        "factual gender needs word pairs", expected="[(male, female), ...]", found=found, remedy="e.g. [('father', 'mother')]"
    )


def _no_template(templates: Sequence[Any]) -> ConfigError:
    found = "none" if not templates else repr(list(templates))[:80]
    remedy = f"e.g. {GENDER_TEMPLATES[0]!r}"
    return ConfigError("templates cannot be filled", expected="texts with one {} each", found=found, remedy=remedy)
