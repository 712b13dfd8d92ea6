"""Interventions: operators, scopes, gates, schedules and the plan that applies them.

Every registered operator, gate and schedule can be imported from here by the name of its class, those of other packages too;
one of theirs never takes the place of one of ours.
"""

from __future__ import annotations

from typing import Any

from steer.intervene.attachment import Attachment
from steer.intervene.gate import GATES, Gate
from steer.intervene.intervention import Intervention
from steer.intervene.operator import OPERATORS, Operator
from steer.intervene.plan import Plan
from steer.intervene.schedule import SCHEDULES, Schedule
from steer.intervene.scope import Scope
from steer.registry import public_classes

METHODS = (OPERATORS, GATES, SCHEDULES)

__all__ = ["GATES", "METHODS", "OPERATORS", "SCHEDULES", "Attachment", "Gate", "Intervention", "Operator", "Plan", "Schedule", "Scope"]


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        method = public_classes(METHODS).get(name)
        if method is not None:
            return method
    raise AttributeError(f"module 'steer.intervene' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *public_classes(METHODS)})
