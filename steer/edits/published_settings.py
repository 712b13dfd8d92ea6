"""Settings of editors that were published for a model: what an editor has there when it is asked for by its name.

From the settings that the authors' own programs ship (ROME, MEMIT and FT-L for GPT-2 XL and GPT-J; AlphaEdit's for Llama 3), and EasyEdit's
for the other models. What is no number of one model is not here: contexts and keys are the same everywhere, and the threshold and L2 of
AlphaEdit, which belong to a covariance with sinks in it, stay relative to the covariance at hand.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.edits.edited_map import edited_maps
from steer.edits.value_settings import ValueSettings
from steer.errors import EditError
from steer.model.anatomy import Anatomy

_ROME = ValueSettings(clamp=4.0, clamp_of="mlp_output")
_EASYEDIT = ValueSettings(steps=25, clamp=4.0, weight_decay=1e-3)
_EASYEDIT_ROME = ValueSettings(steps=25, clamp=4.0, clamp_of="mlp_output", weight_decay=1e-3)
_LLAMA_3 = ValueSettings(lr=0.1, steps=25)
_OF_EASYEDIT: dict[str, dict[str, Any]] = {
    "rome": {"value_settings": _EASYEDIT_ROME},
    "memit": {"ridge": 15_000.0, "value_settings": _EASYEDIT},
}

# (model type, layers, width, width f of the keys): by editor, what differs from its own defaults
SETTINGS: dict[tuple[str, int, int, int], dict[str, dict[str, Any]]] = {
    ("gpt2", 24, 1024, 4096): {"constrained_ft": {"epsilon": 2e-3}},  # medium
    ("gpt2", 48, 1600, 6400): {  # XL
        "rome": {"value_settings": _ROME},
        "memit": {"ridge": 20_000.0},
        "constrained_ft": {"epsilon": 5e-4},
    },
    ("gptj", 28, 4096, 16384): {
        "rome": {"value_settings": _ROME},
        "memit": {"ridge": 15_000.0, "value_settings": ValueSettings(steps=25)},
        "alphaedit": {"value_settings": ValueSettings(steps=25)},
        "pmet": {"ridge": 6_000.0},
        "constrained_ft": {"epsilon": 5e-5},
    },
    ("llama", 32, 4096, 14336): {  # Llama 3 8B
        "rome": {"value_settings": _EASYEDIT_ROME},
        "memit": {"ridge": 15_000.0, "value_settings": _LLAMA_3},
        "alphaedit": {"value_settings": _LLAMA_3},
    },
    ("llama", 32, 4096, 11008): _OF_EASYEDIT,  # Llama 2 7B
    ("mistral", 32, 4096, 14336): _OF_EASYEDIT,  # 7B
    ("qwen2", 28, 3584, 18944): _OF_EASYEDIT,  # Qwen 2.5 7B
}


def published_settings(model: nn.Module, editor: str) -> dict[str, Any]:
    """What an editor is set to for a model, by the names of its fields; empty where nothing was published.

    Args:
        editor: its name.

    Example:
        >>> published_settings(model, "memit")  # of GPT-2 XL
        {'ridge': 20000.0}
    """
    anatomy = Anatomy.find(model)
    size = anatomy.kind, anatomy.n_layers, anatomy.width
    if all(key[:3] != size for key in SETTINGS):
        return {}
    try:
        (edited,) = edited_maps(anatomy, [0])
    except EditError:  # of a block that cannot be edited: its layer is refused when it is asked for
        return {}
    return dict(SETTINGS.get((*size, edited.in_width), {}).get(editor, {}))
