"""Bias: data sets and metrics, each beside what the model knows of factual gender.

measure(model, "crows_pairs", tokenizer=None, path=None, sample=None, factual=None, **options) -> BiasTable
load("stereoset", path=None, source=None, hub=None, **options) -> BiasData
factual_gender(model, tokenizer=None, *, pairs=words.TEST, templates=GENDER_TEMPLATES, pronouns=(" him", " her")) -> FactualGender
pronoun_shift(model, professions, tokenizer=None, *, templates=GENDER_TEMPLATES, baseline="person", pronouns=...) -> PronounShift
    sentence_shift(model, load("winogender"), tokenizer=None, *, baseline="person") -> PronounShift
"""

from steer.bias.dataset import DATASETS, BiasDataset, load
from steer.bias.estimates import Estimate
from steer.bias.factual import GENDER_TEMPLATES, FactualGender, factual_gender
from steer.bias.items import BiasData
from steer.bias.measuring import measure
from steer.bias.shift import PronounShift, pronoun_shift, sentence_shift
from steer.bias.table import BiasRow, BiasTable, Column

__all__ = [
    "DATASETS",
    "GENDER_TEMPLATES",
    "BiasData",
    "BiasDataset",
    "BiasRow",
    "BiasTable",
    "Column",
    "Estimate",
    "FactualGender",
    "PronounShift",
    "factual_gender",
    "load",
    "measure",
    "pronoun_shift",
    "sentence_shift",
]
