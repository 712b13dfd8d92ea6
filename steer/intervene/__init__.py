"""Interventions: operators, scopes, gates, schedules and the plan that applies them."""

from steer.intervene.ablate import Ablate
from steer.intervene.ablate_then_add import AblateThenAdd
from steer.intervene.ace import Ace
from steer.intervene.add import Add
from steer.intervene.clamp import Clamp
from steer.intervene.erase import Erase
from steer.intervene.gate import GATES, Gate
from steer.intervene.gates import CallGate, CosineGate, FeatureGate, ProbeGate
from steer.intervene.head_shift import HeadShift
from steer.intervene.intervention import Intervention
from steer.intervene.k_steering import KSteering
from steer.intervene.loreft import LoReFT
from steer.intervene.mirror import Mirror
from steer.intervene.operator import OPERATORS, Operator
from steer.intervene.plan import Plan
from steer.intervene.reft_r1 import ReftR1
from steer.intervene.replace import Replace
from steer.intervene.rotate import Rotate
from steer.intervene.scale import Scale
from steer.intervene.schedule import SCHEDULES, Constant, Cosine, Linear, WarmupDecay
from steer.intervene.scope import Scope
from steer.intervene.target_projection import TargetProjection

__all__ = [
    "GATES",
    "OPERATORS",
    "SCHEDULES",
    "Ablate",
    "AblateThenAdd",
    "Ace",
    "Add",
    "CallGate",
    "Clamp",
    "Constant",
    "Cosine",
    "CosineGate",
    "Erase",
    "FeatureGate",
    "Gate",
    "HeadShift",
    "Intervention",
    "KSteering",
    "Linear",
    "LoReFT",
    "Mirror",
    "Operator",
    "Plan",
    "ProbeGate",
    "ReftR1",
    "Replace",
    "Rotate",
    "Scale",
    "Scope",
    "TargetProjection",
    "WarmupDecay",
]
