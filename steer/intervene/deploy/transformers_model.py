"""The model that transformers saves, loads and names modules in, wherever it lies between the wrappers."""

from __future__ import annotations

from typing import Any

from steer.model.anatomy import Anatomy


def transformers_model(anatomy: Anatomy) -> Any:
    """The outermost transformers model around a decoder; None where there is none."""
    from transformers import PreTrainedModel  # takes seconds to import, unless there is such a model

    return next((module for module in anatomy.chain if isinstance(module, PreTrainedModel)), None)
