"""Circuits: graphs of what a target depends on inside a model, and the plans that take them out."""

from steer.circuits.ablation import Ablation, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.acdc import acdc
from steer.circuits.attribute import attribute
from steer.circuits.attribute_chunks import attribute_chunks
from steer.circuits.attribution_method import ATTRIBUTION_METHODS
from steer.circuits.backward_rule import BACKWARD_RULES
from steer.circuits.causal_scrubbing import CausalScrubbing, causal_scrubbing
from steer.circuits.circuit import Circuit
from steer.circuits.circuit_drift import circuit_directions, circuit_effect
from steer.circuits.circuit_losses import AblatedTeacherLoss, circuit_losses
from steer.circuits.component_evaluation import ComponentEvaluation
from steer.circuits.component_results import Completeness, ComponentFaithfulness, FaithfulnessCurve, Minimality
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.damage import Damage, damage
from steer.circuits.das import DAS, fit_das
from steer.circuits.edge_attachment import EdgesAblated
from steer.circuits.evaluation import ExactEffects, Faithfulness
from steer.circuits.feature_circuit import FeatureCircuit, feature_circuit
from steer.circuits.gradient_mask import GradientMask
from steer.circuits.graph import Graph, Node
from steer.circuits.heads import (
    AttentionPatterns,
    Head,
    HeadEffects,
    HeadScores,
    LogitAttribution,
    attention_patterns,
    copy_scores,
    head_effects,
    head_scores,
    logit_attribution,
    repeated_tokens,
    successor_scores,
)
from steer.circuits.information_flow import information_flow
from steer.circuits.interchange import Interchange, interchange
from steer.circuits.learn import learn_circuit
from steer.circuits.lora import lora_config
from steer.circuits.optimal_ablation import optimal_ablation
from steer.circuits.pairs import Pairs
from steer.circuits.patch_effects import PatchEffects, patch_effects
from steer.circuits.path_patching import path_patch
from steer.circuits.targets import LogitDifference, LogProbability
from steer.circuits.terms import Faithful, KeepKL, KeepTarget, Shift
from steer.circuits.top_parts import top_parts
from steer.circuits.weights import FeatureWeights, feature_weights

__all__ = [
    "ATTRIBUTION_METHODS",
    "AblatedTeacherLoss",
    "Ablation",
    "AttentionPatterns",
    "BACKWARD_RULES",
    "CausalScrubbing",
    "Circuit",
    "Completeness",
    "ComponentEvaluation",
    "ComponentFaithfulness",
    "ComponentGraph",
    "ComponentScores",
    "DAS",
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
    "Head",
    "HeadEffects",
    "HeadScores",
    "Interchange",
    "KeepKL",
    "KeepTarget",
    "LogProbability",
    "LogitAttribution",
    "LogitDifference",
    "Minimality",
    "Node",
    "Pairs",
    "PatchEffects",
    "Shift",
    "acdc",
    "attention_patterns",
    "attribute",
    "attribute_chunks",
    "causal_scrubbing",
    "circuit_directions",
    "circuit_effect",
    "circuit_losses",
    "copy_scores",
    "damage",
    "feature_circuit",
    "feature_weights",
    "fit_das",
    "head_effects",
    "head_scores",
    "information_flow",
    "interchange",
    "learn_circuit",
    "logit_attribution",
    "lora_config",
    "mean_ablation",
    "optimal_ablation",
    "patch_effects",
    "path_patch",
    "repeated_tokens",
    "resample_ablation",
    "successor_scores",
    "top_parts",
    "zero_ablation",
]
