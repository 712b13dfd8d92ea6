"""Interventions: operators, scopes, gates, schedules and the plan that applies them."""

from steer.intervene.ablate import Ablate
from steer.intervene.add import Add
from steer.intervene.gate import GATES, Gate
from steer.intervene.gates import CallGate, CosineGate, FeatureGate, ProbeGate
from steer.intervene.intervention import Intervention
from steer.intervene.operator import OPERATORS, Operator
from steer.intervene.plan import Plan
from steer.intervene.schedule import SCHEDULES, Constant, Cosine, Linear, WarmupDecay
from steer.intervene.scope import Scope

__all__ = [
    "GATES",
    "OPERATORS",
    "SCHEDULES",
    "Ablate",
    "Add",
    "CallGate",
    "Constant",
    "Cosine",
    "CosineGate",
    "FeatureGate",
    "Gate",
    "Intervention",
    "Linear",
    "Operator",
    "Plan",
    "ProbeGate",
    "Scope",
    "WarmupDecay",
]
