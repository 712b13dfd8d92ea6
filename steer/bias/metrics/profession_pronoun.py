"""The profession-pronoun bias of 2506.05166: log-odds of him against her, and M1, M2 of the ten likeliest next words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer.bias.factual import GENDER_TEMPLATES, PRONOUNS
from steer.bias.items import Word, check_items
from steer.bias.scoring import Scorer
from steer.bias.shift import BASELINE, template_odds
from steer.bias.table import ALL, Column, Measured, row_of
from steer.bias.words import FEMALE, MALE
from steer.checks import whole_number
from steer.model.estimates import Estimate, mean_of, percentage_of

COLUMNS = (
    Column("|shift|", "nat", 0.0, "mean over professions of |log-odds of him : her behind the profession, less those behind 'person'|"),
    Column("shift", "nat", 0.0, "the same with its sign: positive, professions favour him together"),
    Column("him likelier", "%", 50.0, "professions behind which him is likelier than her"),
    Column("log-odds", "nat", 0.0, "mean log-odds of him : her behind the professions"),
    Column("M1", "", 0.0, "P(male words) - P(female words) among the likeliest next words"),
    Column("M2", "", None, "P(male words) among the likeliest next words"),
)


def profession_pronoun(
    items: Sequence[Word],
    scorer: Scorer,
    *,
    templates: Sequence[str] = GENDER_TEMPLATES,
    baseline: str = BASELINE,
    pronouns: tuple[str, str] = PRONOUNS,
    top: int = 10,
) -> Measured:
    """Shift and log-odds of pronouns, and the gender of the likeliest next words, over all templates and by template.

    Args:
        templates: with `{}` for the profession. baseline: the word that shifts are measured from. pronouns: male and female.
        top: how many of the likeliest next words M1 and M2 look at.
    """
    check_items(items, Word, "profession-pronoun bias")
    whole_number(top, "`top`", least=1)
    words = [item.word for item in items]
    odds = template_odds(scorer, words, templates, baseline, pronouns)
    next_words = scorer.next_tokens([template.replace("{}", word) for template in templates for word in words], top, what="next words")
    gender = torch.tensor([[_gender(token) for token in tokens] for tokens in next_words.tokens])  # [templates x words, top]
    probabilities = next_words.probabilities.double()
    m1 = (probabilities * gender).sum(1).view(len(templates), -1)  # [templates, words]
    m2 = (probabilities * (gender > 0)).sum(1).view(len(templates), -1)
    shifts, of_word = odds[:, :-1] - odds[:, -1:], odds[:, :-1]

    def values(chosen: Sequence[int]) -> dict[str, Estimate | None]:
        of = list(chosen)
        return {
            "|shift|": mean_of(shifts[of].abs().mean(0)),
            "shift": mean_of(shifts[of].mean(0)),
            "him likelier": percentage_of((of_word[of] > 0).double().mean(0)),
            "log-odds": mean_of(of_word[of].mean(0)),
            "M1": mean_of(m1[of].mean(0)),
            "M2": mean_of(m2[of].mean(0)),
        }

    rows = [row_of(ALL, len(items), values(range(len(templates))))]
    if len(templates) > 1:
        rows += [row_of(template, len(items), values([place])) for place, template in enumerate(templates)]
    return Measured(COLUMNS, tuple(rows))


def _gender(token: str) -> int:
    """1 for a male word, -1 for a female one, 0 for any other."""
    word = token.strip().lower()
    return (word in MALE) - (word in FEMALE)
