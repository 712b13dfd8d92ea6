"""Words that are facts of English: who is a man and who is a woman by definition, occupations, nationalities, kind and unkind words.

Of the word pairs of factual gender, `SELECT` is for everything that chooses or fits (a circuit, a direction, gates), `TEST` for what is
reported. No word of one, nor the stem of one, is in the other: fatherly kinds are in one half, `-man` and `-woman` in the other.
"""

from __future__ import annotations

Pairs = tuple[tuple[str, str], ...]


def _pairs(text: str) -> Pairs:
    return tuple((male, female) for male, female in (pair.split("/") for pair in text.split()))


SELECT: Pairs = _pairs(
    "man/woman boy/girl king/queen son/daughter brother/sister husband/wife groom/bride gentleman/lady monk/nun wizard/witch lad/lass "
    "cowboy/cowgirl businessman/businesswoman salesman/saleswoman policeman/policewoman grandson/granddaughter"
)
TEST: Pairs = _pairs(
    "father/mother actor/actress uncle/aunt prince/princess grandfather/grandmother waiter/waitress duke/duchess nephew/niece "
    "widower/widow emperor/empress stepfather/stepmother godfather/godmother dad/mom baron/baroness sorcerer/sorceress abbot/abbess"
)

PROFESSIONS: tuple[str, ...] = tuple(
    "accountant architect artist attorney author baker banker barber bartender biologist bookkeeper butcher captain carpenter cashier "
    "chef chemist cleaner clerk coach cook dancer dentist designer detective doctor driver economist editor electrician engineer farmer "
    "firefighter fisherman gardener geologist guard hairdresser housekeeper inspector janitor journalist judge laborer lawyer librarian "
    "manager mechanic miner musician nanny nurse painter paramedic pharmacist photographer physician physicist pilot plumber poet "
    "politician porter professor programmer psychologist receptionist sailor scientist secretary sheriff singer soldier surgeon surveyor "
    "tailor teacher technician therapist trader translator trucker undertaker veterinarian welder writer".split()
)

NATIONALITIES: tuple[str, ...] = tuple(
    "Afghan Albanian Algerian American Argentine Australian Austrian Bangladeshi Belgian Bolivian Brazilian British Bulgarian Cambodian "
    "Canadian Chilean Chinese Colombian Congolese Croatian Cuban Czech Danish Dutch Ecuadorian Egyptian Ethiopian Finnish French German "
    "Ghanaian Greek Haitian Hungarian Indian Indonesian Iranian Iraqi Irish Israeli Italian Jamaican Japanese Jordanian Kenyan Korean "
    "Kuwaiti Lebanese Libyan Malaysian Mexican Moroccan Nepalese Nigerian Norwegian Pakistani Palestinian Peruvian Polish Portuguese "
    "Romanian Russian Rwandan Saudi Scottish Senegalese Serbian Somali Spanish Sudanese Swedish Swiss Syrian Thai Tunisian Turkish "
    "Ugandan Ukrainian Uruguayan Venezuelan Vietnamese Yemeni Zambian Zimbabwean".split()
)

MALE: frozenset[str] = frozenset(
    "he him his himself man men boy boys father fathers son sons brother brothers husband husbands uncle uncles nephew king prince dad "
    "daddy grandfather grandpa grandson gentleman gentlemen sir mr male males guy guys lad lads".split()
)
FEMALE: frozenset[str] = frozenset(
    "she her hers herself woman women girl girls mother mothers daughter daughters sister sisters wife wives aunt aunts niece queen "
    "princess mom mum mommy grandmother grandma granddaughter lady ladies madam mrs ms miss female females gal gals lass lasses".split()
)

POSITIVE: frozenset[str] = frozenset(
    "good great nice kind friendly happy lucky proud warm welcoming generous polite clever smart intelligent brave honest beautiful "
    "wonderful amazing helpful gentle loving loved strong talented creative hospitable cheerful calm patient wise passionate respectful "
    "hardworking hard-working caring cool fun funny charming optimistic resilient successful rich grateful".split()
)
NEGATIVE: frozenset[str] = frozenset(
    "bad evil mean rude cruel stupid dumb ignorant lazy dirty ugly poor angry violent dangerous aggressive corrupt selfish greedy cold "
    "hostile arrogant dishonest sad miserable weak backward crazy insane boring racist hateful hated desperate frustrated afraid scared "
    "tired sick hungry oppressed brutal horrible terrible awful nasty paranoid obsessed annoying".split()
)
