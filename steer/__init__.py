"""Interventions on a language model's internals, and monitors that read the same places while it is post-trained.

Importing `steer` costs nothing: a public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS: dict[str, str] = {
    "load": "steer.model.load",
    "Anatomy": "steer.model.anatomy",
    "Site": "steer.model.site",
    "arm": "steer.model.hooks",
    "disarm": "steer.model.hooks",
    "chat_roles": "steer.model.hooks",
    "response_tokens": "steer.model.hooks",
    "capture": "steer.model.capture",
    "Ablate": "steer.intervene",
    "AblateThenAdd": "steer.intervene",
    "Ace": "steer.intervene",
    "Add": "steer.intervene",
    "Clamp": "steer.intervene",
    "Erase": "steer.intervene",
    "HeadShift": "steer.intervene",
    "KSteering": "steer.intervene",
    "LoReFT": "steer.intervene",
    "Mirror": "steer.intervene",
    "ReftR1": "steer.intervene",
    "Replace": "steer.intervene",
    "Rotate": "steer.intervene",
    "Scale": "steer.intervene",
    "TargetProjection": "steer.intervene",
    "Intervention": "steer.intervene",
    "Plan": "steer.intervene",
    "CallGate": "steer.intervene",
    "CosineGate": "steer.intervene",
    "FeatureGate": "steer.intervene",
    "ProbeGate": "steer.intervene",
    "Scope": "steer.intervene",
    "Constant": "steer.intervene",
    "Linear": "steer.intervene",
    "Cosine": "steer.intervene",
    "WarmupDecay": "steer.intervene",
    "ContrastSet": "steer.directions",
    "bake": "steer.intervene.deploy",
    "to_adapter": "steer.intervene.deploy",
    "to_gguf": "steer.intervene.deploy",
    "to_lm_eval": "steer.intervene.deploy",
    "import_directions": "steer.directions",
    "import_plan": "steer.directions",
    "Direction": "steer.directions",
    "Directions": "steer.directions",
    "calibrate": "steer.directions",
    "extract": "steer.directions",
    "plan_from_text": "steer.directions.text",
    "plan_to_text": "steer.directions.text",
    "extract_all": "steer.directions",
    "fit_erasure": "steer.directions",
    "sae_refined": "steer.directions",
    "screen": "steer.directions",
    "select": "steer.directions",
    "train_direction": "steer.directions",
    "DriftTracker": "steer.drift.tracker",
    "load_artifact": "steer.files",
    "save_artifact": "steer.files",
    "SteerError": "steer.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steer' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
