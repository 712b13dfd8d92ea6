"""Bias: data sets and metrics, each beside what the model knows of factual gender; debiasing baselines, and what they cost.

measure(model, "crows_pairs", tokenizer=None, path=None, sample=None, factual=None, **options) -> BiasTable
load("stereoset", path=None, source=None, hub=None, **options) -> BiasData
factual_gender(model, tokenizer=None, *, pairs=words.TEST, templates=GENDER_TEMPLATES, pronouns=(" him", " her")) -> FactualGender
pronoun_shift(model, professions, tokenizer=None, *, templates=GENDER_TEMPLATES, baseline="person", pronouns=...) -> PronounShift
mitigations() -> names; fit_mitigation(name, model, texts=None, *, tokenizer=None, **options) -> Mitigation
side_effects(model, sources, *, tokenizer=None, items=None) -> SideEffects
augmented(rows, *, sided="two", pairs=None), counterfactuals(rows, pairs=None) -> rows
sentence_shift(model, load("winogender"), tokenizer=None, *, baseline="person") -> PronounShift
"""

from steer.bias.counterfactual import augmented, counterfactuals
from steer.bias.dataset import DATASETS, BiasDataset, load
from steer.bias.debiasing import MITIGATIONS, Mitigation, fit_mitigation, mitigations
from steer.bias.factual import GENDER_TEMPLATES, FactualGender, factual_gender
from steer.bias.items import BiasData
from steer.bias.measuring import measure
from steer.bias.shift import PronounShift, pronoun_shift, sentence_shift
from steer.bias.side_effects import SideEffects, SideEffectsChange, side_effects
from steer.bias.table import BiasRow, BiasTable, Column
from steer.model.estimates import Estimate

__all__ = [
    "DATASETS",
    "GENDER_TEMPLATES",
    "MITIGATIONS",
    "BiasData",
    "BiasDataset",
    "BiasRow",
    "BiasTable",
    "Column",
    "Estimate",
    "FactualGender",
    "Mitigation",
    "PronounShift",
    "SideEffects",
    "SideEffectsChange",
    "augmented",
    "counterfactuals",
    "factual_gender",
    "fit_mitigation",
    "load",
    "measure",
    "mitigations",
    "pronoun_shift",
    "sentence_shift",
    "side_effects",
]
