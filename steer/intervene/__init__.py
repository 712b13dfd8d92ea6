"""Interventions: operators, scopes, schedules and the plan that applies them."""

from steer.intervene.ablate import Ablate
from steer.intervene.add import Add
from steer.intervene.intervention import Intervention
from steer.intervene.operator import OPERATORS, Operator
from steer.intervene.plan import Plan
from steer.intervene.schedule import SCHEDULES, Constant, Cosine, Linear, WarmupDecay
from steer.intervene.scope import Scope

__all__ = [
    "OPERATORS",
    "SCHEDULES",
    "Ablate",
    "Add",
    "Constant",
    "Cosine",
    "Intervention",
    "Linear",
    "Operator",
    "Plan",
    "Scope",
    "WarmupDecay",
]
