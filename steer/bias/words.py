"""Word lists of the bias room: words of two genders in pairs, sentences about them, and sentences about neither.

Two lists of nouns are kept apart. What a mitigation is fitted on comes from `FITTING_PAIRS`; whether a model still knows that a mother is a
she is asked of `FACTUAL_PAIRS`, which no default of a mitigation's fit uses.
"""

from __future__ import annotations

from collections.abc import Sequence

# (male, female); one list for fitting, one for the factual test, without a word in common
FITTING_PAIRS = (
    ("man", "woman"),
    ("boy", "girl"),
    ("gentleman", "lady"),
    ("son", "daughter"),
    ("brother", "sister"),
    ("uncle", "aunt"),
    ("nephew", "niece"),
    ("grandson", "granddaughter"),
    ("bridegroom", "bride"),
    ("schoolboy", "schoolgirl"),
    ("businessman", "businesswoman"),
    ("stepson", "stepdaughter"),
)
FACTUAL_PAIRS = (
    ("father", "mother"),
    ("king", "queen"),
    ("prince", "princess"),
    ("husband", "wife"),
    ("actor", "actress"),
    ("waiter", "waitress"),
    ("grandfather", "grandmother"),
    ("duke", "duchess"),
    ("monk", "nun"),
    ("landlord", "landlady"),
    ("stepfather", "stepmother"),
    ("widower", "widow"),
)

# (male, female) in the nominative, as object, before a noun, alone, and reflexive; "her" is both object and possessive
PRONOUNS = (("he", "she"), ("him", "her"), ("his", "her"), ("his", "hers"), ("himself", "herself"))

# further pairs that counterfactual augmentation swaps
SWAP_PAIRS = (
    *FITTING_PAIRS,
    *FACTUAL_PAIRS,
    ("men", "women"),
    ("boys", "girls"),
    ("gentlemen", "ladies"),
    ("sons", "daughters"),
    ("brothers", "sisters"),
    ("uncles", "aunts"),
    ("nephews", "nieces"),
    ("fathers", "mothers"),
    ("kings", "queens"),
    ("princes", "princesses"),
    ("husbands", "wives"),
    ("actors", "actresses"),
    ("waiters", "waitresses"),
    ("grandfathers", "grandmothers"),
    ("businessmen", "businesswomen"),
    ("dad", "mom"),
    ("dads", "moms"),
    ("daddy", "mommy"),
    ("grandpa", "grandma"),
    ("male", "female"),
    ("males", "females"),
    ("boyfriend", "girlfriend"),
    ("boyfriends", "girlfriends"),
    ("policeman", "policewoman"),
    ("policemen", "policewomen"),
    ("spokesman", "spokeswoman"),
    ("chairman", "chairwoman"),
    ("congressman", "congresswoman"),
    ("salesman", "saleswoman"),
    ("host", "hostess"),
    ("heir", "heiress"),
    ("hero", "heroine"),
    ("mr", "mrs"),
    ("sir", "madam"),
)

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

_FORMS = tuple(dict(zip(("he", "him", "his"), (pair[side] for pair in PRONOUNS[:3]), strict=True)) for side in (0, 1))


def gender_prompts(pairs: Sequence[tuple[str, str]] = FITTING_PAIRS) -> list[tuple[str, str]]:
    """(male, female) beginnings of sentences that a pronoun may continue, one for each pair of nouns and each of `PRONOUN_TEMPLATES`."""
    return [(template.format(noun=male), template.format(noun=female)) for template in PRONOUN_TEMPLATES for male, female in pairs]


def gender_sentences(pairs: Sequence[tuple[str, str]] = FITTING_PAIRS) -> list[tuple[str, str]]:
    """(male, female) whole sentences that differ in noun and pronouns, one for each pair of nouns and each of `SENTENCE_TEMPLATES`."""
    male_forms, female_forms = _FORMS
    return [
        (template.format(noun=male, **male_forms), template.format(noun=female, **female_forms))
        for template in SENTENCE_TEMPLATES
        for male, female in pairs
    ]
