"""Circuits: graphs of what a target depends on inside a model, and the plans that take them out."""

from steer.circuits.ablation import Ablation, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.attribute import attribute
from steer.circuits.attribute_chunks import attribute_chunks
from steer.circuits.attribution_method import ATTRIBUTION_METHODS
from steer.circuits.backward_rule import BACKWARD_RULES
from steer.circuits.circuit import Circuit
from steer.circuits.circuit_drift import circuit_directions, circuit_effect
from steer.circuits.circuit_losses import AblatedTeacherLoss, circuit_losses
from steer.circuits.component_evaluation import ComponentEvaluation
from steer.circuits.component_results import Completeness, ComponentFaithfulness, FaithfulnessCurve, Minimality
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.damage import Damage, damage
from steer.circuits.edge_attachment import EdgesAblated
from steer.circuits.evaluation import ExactEffects, Faithfulness
from steer.circuits.feature_circuit import FeatureCircuit, feature_circuit
from steer.circuits.gradient_mask import GradientMask
from steer.circuits.graph import Graph, Node
from steer.circuits.information_flow import information_flow
from steer.circuits.learn import learn_circuit
from steer.circuits.lora import lora_config
from steer.circuits.optimal_ablation import optimal_ablation
from steer.circuits.pairs import Pairs
from steer.circuits.targets import LogitDifference, LogProbability
from steer.circuits.terms import Faithful, KeepKL, KeepTarget, Shift
from steer.circuits.weights import FeatureWeights, feature_weights

__all__ = [
    "ATTRIBUTION_METHODS",
    "BACKWARD_RULES",
    "AblatedTeacherLoss",
    "Ablation",
    "Circuit",
    "Completeness",
    "ComponentEvaluation",
    "ComponentFaithfulness",
    "ComponentGraph",
    "ComponentRun",
    "ComponentScores",
    "Damage",
    "EdgesAblated",
    "ExactEffects",
    "Faithful",
    "Faithfulness",
    "FaithfulnessCurve",
    "FeatureCircuit",
    "FeatureWeights",
    "GradientMask",
    "Graph",
    "KeepKL",
    "KeepTarget",
    "LogProbability",
    "LogitDifference",
    "Minimality",
    "Node",
    "Pairs",
    "Shift",
    "TakenOut",
    "attribute",
    "attribute_chunks",
    "circuit_directions",
    "circuit_effect",
    "circuit_losses",
    "damage",
    "feature_circuit",
    "feature_weights",
    "information_flow",
    "learn_circuit",
    "lora_config",
    "mean_ablation",
    "optimal_ablation",
    "resample_ablation",
    "zero_ablation",
]
