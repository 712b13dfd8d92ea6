"""Training of dictionaries: activations streamed from a model through a shuffled buffer, any number of dictionaries from one pass of it."""

from steer.features.training.activation_data import ActivationData, Calibration
from steer.features.training.dictionary_config import DictionaryConfig
from steer.features.training.learner import Learner
from steer.features.training.module import DictionaryModule
from steer.features.training.optimisation import Optimisation
from steer.features.training.sparsifier import SPARSIFIERS, Sparsifier
from steer.features.training.texts import TokenRows, read_texts, token_rows

__all__ = [
    "SPARSIFIERS",
    "ActivationData",
    "Calibration",
    "DictionaryConfig",
    "DictionaryModule",
    "Learner",
    "Optimisation",
    "Sparsifier",
    "TokenRows",
    "read_texts",
    "token_rows",
]
