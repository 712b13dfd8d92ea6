"""Texts that mitigations are fitted on when none are given: about words of two genders, in pairs, and about neither.

Their nouns are those of `steer.bias.words.SELECT`. Whether a model still knows that a mother is a she is asked of `TEST`, of which no word
is here.
"""

from __future__ import annotations

from collections.abc import Sequence

from steer.bias.words import SELECT

HE = {"he": "he", "him": "him", "his": "his"}
SHE = {"he": "she", "him": "her", "his": "her"}

# a pronoun may follow each of them
PRONOUN_TEMPLATES = (
    "The {noun} came in late, and the teacher greeted",
    "The {noun} lost the keys, so a neighbour helped",
    "The {noun} was tired because",
    "The {noun} stayed at home, where",
    "The {noun} sat down and took off",
    "The {noun} looked into the mirror and combed",
)

SENTENCE_TEMPLATES = (
    "The {noun} said that {he} would come home in the evening.",
    "Yesterday the {noun} forgot {his} umbrella on the train.",
    "Everyone in the village knows the {noun} and likes {him}.",
    "The {noun} reads the newspaper while {he} drinks coffee.",
    "When the {noun} opened {his} letter, {he} began to laugh.",
    "A friend of the {noun} lent {him} some money.",
)

# about no person at all: what an activation is when nobody is spoken of
NEUTRAL_SENTENCES = (
    "The river rises in the mountains and flows through a wide valley before it reaches the sea.",
    "Bread is made of flour, water, salt and yeast, and it is baked until the crust is brown.",
    "In winter the days are short, and snow covers the fields for several weeks.",
    "The museum has a large collection of old maps, most of them printed in the eighteenth century.",
    "A train leaves for the coast every hour, and the journey takes about forty minutes.",
    "Copper conducts electricity well, which is why most cables are made of it.",
    "The harbour was built on a sandy island that is connected to the town by two bridges.",
    "Some birds cross the desert in spring and return in autumn along the same route.",
    "The report lists the costs of the new road and the dates on which each part will be opened.",
    "Glass does not rust, but it breaks easily when it is heated on one side only.",
    "The market is open on weekdays, and fruit is cheapest shortly before it closes.",
    "Most of the houses in the old quarter have thick walls and small windows.",
)


def gender_prompts(pairs: Sequence[tuple[str, str]] = SELECT) -> list[tuple[str, str]]:
    """(male, female) beginnings of sentences that a pronoun may continue, one for each pair of nouns and each of `PRONOUN_TEMPLATES`."""
    return [(template.format(noun=male), template.format(noun=female)) for template in PRONOUN_TEMPLATES for male, female in pairs]


def gender_sentences(pairs: Sequence[tuple[str, str]] = SELECT) -> list[tuple[str, str]]:
    """(male, female) whole sentences that differ in noun and pronouns, one for each pair of nouns and each of `SENTENCE_TEMPLATES`."""
    return [
        (template.format(noun=male, **HE), template.format(noun=female, **SHE)) for template in SENTENCE_TEMPLATES for male, female in pairs
    ]
