"""Circuits: graphs of what a target depends on inside a model, and the plans that take them out."""

from steer.circuits.ablation import Ablation, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.attribute import attribute
from steer.circuits.attribute_chunks import attribute_chunks
from steer.circuits.attribution_method import ATTRIBUTION_METHODS
from steer.circuits.backward_rule import BACKWARD_RULES
from steer.circuits.circuit import Circuit
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.evaluation import ExactEffects, Faithfulness
from steer.circuits.feature_circuit import FeatureCircuit, feature_circuit
from steer.circuits.graph import Graph, Node
from steer.circuits.information_flow import information_flow
from steer.circuits.pairs import Pairs
from steer.circuits.targets import LogitDifference, LogProbability
from steer.circuits.weights import FeatureWeights, feature_weights

__all__ = [
    "ATTRIBUTION_METHODS",
    "BACKWARD_RULES",
    "Ablation",
    "Circuit",
    "ComponentGraph",
    "ComponentScores",
    "ExactEffects",
    "Faithfulness",
    "FeatureCircuit",
    "FeatureWeights",
    "Graph",
    "LogProbability",
    "LogitDifference",
    "Node",
    "Pairs",
    "attribute",
    "attribute_chunks",
    "feature_circuit",
    "feature_weights",
    "information_flow",
    "mean_ablation",
    "resample_ablation",
    "zero_ablation",
]
