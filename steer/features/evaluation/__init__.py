"""Evaluation of dictionaries: reconstruction, sparse probing, targeted perturbation, and activations whose true dictionary is known."""

from steer.features.evaluation.perturbation import Perturbation, targeted_perturbation
from steer.features.evaluation.pooled import PooledTexts, pooled_texts
from steer.features.evaluation.probing import SparseProbe, sparse_probing
from steer.features.evaluation.reconstruction import reconstruction
from steer.features.evaluation.synthetic import SyntheticFeatures

__all__ = [
    "Perturbation",
    "PooledTexts",
    "SparseProbe",
    "SyntheticFeatures",
    "pooled_texts",
    "reconstruction",
    "sparse_probing",
    "targeted_perturbation",
]
