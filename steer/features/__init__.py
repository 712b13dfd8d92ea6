"""Features: dictionaries (sparse autoencoders, transcoders, crosscoders), read from the files of every library that trains them.

Its packages are loaded on first use, e.g. `steer.features.evaluation`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from steer.features.activation import ACTIVATIONS, Activation
from steer.features.dictionary import ARCHITECTURES, Dictionary
from steer.features.encoder import Encoder
from steer.features.feature_loss import FeatureLoss
from steer.features.format import FORMATS
from steer.features.gain_penalty import GainPenalty
from steer.features.load import load_dictionary
from steer.features.provenance import Origin, Source, Untrained
from steer.features.random_features import random_features
from steer.features.refined import sae_refined
from steer.features.rows import InMemory, LowRank, Rows
from steer.features.statistics import FeatureStatistics, feature_statistics

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "FORMATS",
    "Activation",
    "Dictionary",
    "Encoder",
    "FeatureLoss",
    "FeatureStatistics",
    "GainPenalty",
    "InMemory",
    "LowRank",
    "Origin",
    "Rows",
    "Source",
    "Untrained",
    "feature_statistics",
    "load_dictionary",
    "sae_refined",
    "random_features",
]

_PACKAGES = ("evaluation", "reading", "search", "training")


def __getattr__(name: str) -> ModuleType:
    if name not in _PACKAGES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return importlib.import_module(f"{__name__}.{name}")
