"""Circuits: graphs of what a target depends on inside a model, and the plans that take them out."""

from steer.circuits.ablation import Ablation, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.attribute import attribute
from steer.circuits.attribution_method import ATTRIBUTION_METHODS
from steer.circuits.circuit import Circuit
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.evaluation import ExactEffects, Faithfulness
from steer.circuits.feature_circuit import FeatureCircuit, feature_circuit
from steer.circuits.graph import Graph, Node
from steer.circuits.learn import learn_circuit
from steer.circuits.pairs import Pairs
from steer.circuits.targets import LogitDifference, LogProbability
from steer.circuits.terms import Faithful, KeepKL, KeepTarget, Shift
from steer.circuits.weights import FeatureWeights, feature_weights

__all__ = [
    "ATTRIBUTION_METHODS",
    "Ablation",
    "Circuit",
    "ComponentGraph",
    "ComponentScores",
    "ExactEffects",
    "Faithful",
    "Faithfulness",
    "FeatureCircuit",
    "FeatureWeights",
    "Graph",
    "KeepKL",
    "KeepTarget",
    "LogProbability",
    "LogitDifference",
    "Node",
    "Pairs",
    "Shift",
    "attribute",
    "feature_circuit",
    "feature_weights",
    "learn_circuit",
    "mean_ablation",
    "resample_ablation",
    "zero_ablation",
]
