"""Interventions on a language model's internals, and monitors that read the same places while it is post-trained.

Importing `steer` costs nothing: a public name loads its module on first use, and so does a room, e.g. `steer.drift`. Operators, gates and
schedules are public by the name of their class as soon as they are registered, e.g. `steer.Add`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# public name -> the module that defines it
_EXPORTS: dict[str, str] = {
    "load": "steer.model.load",
    "Anatomy": "steer.model.anatomy",
    "describe": "steer.model.describe",
    "Site": "steer.model.site",
    "prepare_compile": "steer.model.hooks",
    "undo_prepare_compile": "steer.model.hooks",
    "chat_roles": "steer.model.annotations",
    "response_tokens": "steer.model.annotations",
    "capture": "steer.model.capture",
    "Intervention": "steer.intervene",
    "Plan": "steer.intervene",
    "Attachment": "steer.intervene",
    "Scope": "steer.intervene",
    "ContrastSet": "steer.directions",
    "bake": "steer.intervene.deploy",
    "Handover": "steer.intervene.deploy",
    "to_adapter": "steer.intervene.deploy",
    "to_gguf": "steer.intervene.deploy",
    "to_lm_eval": "steer.intervene.deploy",
    "import_directions": "steer.directions",
    "import_plan": "steer.directions",
    "Direction": "steer.directions",
    "Directions": "steer.directions",
    "calibrate": "steer.experiment.calibrate",
    "dose_curve": "steer.directions",
    "extract": "steer.directions",
    "plan_from_text": "steer.directions.text",
    "plan_to_text": "steer.directions.text",
    "extract_all": "steer.directions",
    "fit_boundary": "steer.directions",
    "fit_erasure": "steer.directions",
    "sae_refined": "steer.features",
    "screen": "steer.directions",
    "select": "steer.directions",
    "train_direction": "steer.directions",
    "load_dictionary": "steer.features",
    "FeatureLoss": "steer.features",
    "find_features": "steer.features.search",
    "read_features": "steer.features.reading",
    "FeatureReading": "steer.features.reading",
    "FoundFeatures": "steer.features.search",
    "feature_circuit": "steer.circuits",
    "feature_weights": "steer.circuits",
    "FeatureCircuit": "steer.circuits",
    "attention_patterns": "steer.circuits",
    "copy_scores": "steer.circuits",
    "head_effects": "steer.circuits",
    "head_scores": "steer.circuits",
    "logit_attribution": "steer.circuits",
    "successor_scores": "steer.circuits",
    "LogProbability": "steer.circuits",
    "LogitDifference": "steer.circuits",
    "Fact": "steer.edits",
    "Edit": "steer.edits",
    "EditedWeights": "steer.edits",
    "edit_facts": "steer.edits",
    "evaluate_edits": "steer.edits",
    "causal_trace": "steer.edits",
    "LogitLens": "steer.lens",
    "TunedLens": "steer.lens",
    "JacobianLens": "steer.lens",
    "load_lens": "steer.lens",
    "LabelledTexts": "steer.lens",
    "fit_probe": "steer.lens",
    "lens_reading": "steer.lens",
    "DriftTracker": "steer.drift.tracker",
    "compare_features": "steer.drift.stages",
    "compare": "steer.experiment.compare",
    "matched": "steer.experiment.compare",
    "Outcome": "steer.experiment.outcome",
    "Prompt": "steer.experiment.treatments.prompt",
    "Weights": "steer.experiment.treatments.weights",
    "load_artifact": "steer.files",
    "save_artifact": "steer.files",
    "SteerError": "steer.errors",
}

# modules that `steer.<name>` reaches without an import of their own
_ROOMS = (
    *("bias", "callbacks", "circuits", "directions", "drift", "edits", "errors", "experiment", "features", "intervene", "kernels", "lens"),
    *("model", "report", "training", "workbench"),
)

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"steer.{name}")
    if name not in _EXPORTS and not name[:1].isupper():  # only a class can be one of the registered methods
        raise AttributeError(f"module 'steer' has no attribute '{name}'")
    try:
        value = getattr(importlib.import_module(_EXPORTS.get(name, "steer.intervene")), name)
    except AttributeError as error:
        raise AttributeError(f"module 'steer' has no attribute '{name}'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    methods = dir(importlib.import_module("steer.intervene"))
    return sorted({*globals(), *_EXPORTS, *_ROOMS, *(name for name in methods if name[:1].isupper() and not name.isupper())})
