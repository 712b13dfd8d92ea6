"""Circuits: graphs of what a target depends on inside a model, and the plans that take them out."""

from steer.circuits.ablation import Ablation, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.acdc import acdc
from steer.circuits.attribute import attribute
from steer.circuits.attribution_method import ATTRIBUTION_METHODS
from steer.circuits.causal_scrubbing import CausalScrubbing, causal_scrubbing
from steer.circuits.circuit import Circuit
from steer.circuits.component_evaluation import ComponentEvaluation
from steer.circuits.component_results import Completeness, ComponentFaithfulness, FaithfulnessCurve, Minimality
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.das import DAS, fit_das
from steer.circuits.edge_attachment import EdgesAblated
from steer.circuits.evaluation import ExactEffects, Faithfulness
from steer.circuits.feature_circuit import FeatureCircuit, feature_circuit
from steer.circuits.graph import Graph, Node
from steer.circuits.interchange import Interchange, interchange
from steer.circuits.pairs import Pairs
from steer.circuits.patch_effects import PatchEffects, patch_effects
from steer.circuits.path_patching import path_patch
from steer.circuits.targets import LogitDifference, LogProbability
from steer.circuits.weights import FeatureWeights, feature_weights

__all__ = [
    "ATTRIBUTION_METHODS",
    "Ablation",
    "CausalScrubbing",
    "Circuit",
    "Completeness",
    "ComponentEvaluation",
    "ComponentFaithfulness",
    "ComponentGraph",
    "ComponentRun",
    "ComponentScores",
    "DAS",
    "EdgesAblated",
    "ExactEffects",
    "Faithfulness",
    "FaithfulnessCurve",
    "FeatureCircuit",
    "FeatureWeights",
    "Graph",
    "Interchange",
    "LogProbability",
    "LogitDifference",
    "Minimality",
    "Node",
    "Pairs",
    "PatchEffects",
    "TakenOut",
    "acdc",
    "attribute",
    "causal_scrubbing",
    "feature_circuit",
    "feature_weights",
    "fit_das",
    "interchange",
    "mean_ablation",
    "patch_effects",
    "path_patch",
    "resample_ablation",
    "zero_ablation",
]
