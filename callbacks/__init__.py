"""Callbacks for Lightning and their Hugging Face Trainer and TRL twins; each name loads its framework on first use."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that defines it
_EXPORTS = {
    "SteeringCallback": "steer.callbacks.steering",
    "DriftCallback": "steer.callbacks.drift",
    "LossCallback": "steer.callbacks.losses",
    "GradientMaskCallback": "steer.callbacks.gradient_mask",
    "EditCallback": "steer.callbacks.edits",
    "HFSteeringCallback": "steer.callbacks.hf_steering",
    "HFDriftCallback": "steer.callbacks.hf_drift",
    "HFLossCallback": "steer.callbacks.hf_losses",
    "HFGradientMaskCallback": "steer.callbacks.hf_gradient_mask",
    "HFEditCallback": "steer.callbacks.hf_edits",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steer.callbacks' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
