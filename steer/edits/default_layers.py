"""Layers that are edited by default: those of the publications, or that were measured here. Causal tracing does not choose them well.

Hase et al. 2023 (arXiv 2301.04213): where tracing finds a fact says next to nothing about where it is best edited.
"""

from __future__ import annotations

import json
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from steer.edits.covariance import Covariance
from steer.edits.edited_map import edited_maps
from steer.errors import EditError
from steer.model.anatomy import Anatomy

if TYPE_CHECKING:
    from steer.edits.layer_sweep import LayerSweep

MOST = 5  # layers that an edit is spread over

# (model type, layers, width): the one layer of ROME, and those of MEMIT
PUBLISHED: dict[tuple[str, int, int], tuple[int, tuple[int, ...]]] = {
    ("gpt2", 24, 1024): (8, (3, 4, 5, 6, 7, 8)),  # medium; ROME's, and as many layers below
    ("gpt2", 36, 1280): (12, (8, 9, 10, 11, 12)),
    ("gpt2", 48, 1600): (17, (13, 14, 15, 16, 17)),
    ("gptj", 28, 4096): (5, (3, 4, 5, 6, 7, 8)),
    ("gpt_neox", 44, 6144): (15, (6, 7, 8, 9, 10)),
    ("llama", 32, 4096): (5, (4, 5, 6, 7, 8)),  # Llama 2 7B, Llama 3 8B
    ("mistral", 32, 4096): (5, (4, 5, 6, 7, 8)),
    ("qwen2", 28, 3584): (5, (4, 5, 6, 7, 8)),
    ("llama", 30, 576): (8, (4, 5, 6, 7, 8)),  # SmolLM2-135M, measured: docs/results/editing.md
}


def default_layers(anatomy: Anatomy, *, several: bool) -> list[int]:
    """The layers for a model of a known family and size. Raises EditError for another. several: of an editor that spreads an edit.

    Args:
        anatomy: of the model.

    Example:
        >>> model, tokenizer = steer.load("smollm2-135m")
        >>> default_layers(steer.Anatomy.find(model), several=False)
        [8]
    """
    if not is_known(anatomy):
        raise _not_known(anatomy)
    one, many = PUBLISHED[_size(anatomy)]
    return list(many) if several else [one]


def is_known(anatomy: Anatomy) -> bool:
    """Layers of a model of this family and size were published, or measured here."""
    return _size(anatomy) in PUBLISHED


def choose_layers(model: nn.Module, tokenizer: Any, covariance: Covariance | None, *, several: bool) -> list[int]:
    """The layers for any model: of one that is not known the best of a covariance, found by a sweep, once in a process.

    Args:
        several: of an editor that spreads an edit over layers: the best layer and those of the covariance next below it, five at most.

    Raises:
        EditError: a model that is not known, without a covariance, or which says too little of what the sweep edits.

    Example:
        >>> model, tokenizer = steer.load("smollm2-135m")
        >>> choose_layers(model, tokenizer, None, several=True)  # of a model that is known, without a sweep
        [4, 5, 6, 7, 8]
    """
    anatomy = Anatomy.find(model)
    if covariance is None or is_known(anatomy):
        return default_layers(anatomy, several=several)
    layers = tuple(covariance.layers)
    if len(layers) == 1:
        return list(layers)
    best = sweep_of(model, tokenizer, covariance).best
    has_post_norm = edited_maps(anatomy, [best])[0].has_post_norm
    return [layer for layer in layers if layer <= best][-MOST:] if several and not has_post_norm else [best]


def sweep_of(model: nn.Module, tokenizer: Any, covariance: Covariance) -> LayerSweep:
    """The sweep over the layers of a covariance, made once in a process. Raises as `layer_sweep`."""
    from steer.edits.layer_sweep import layer_sweep  # late: it makes edits

    swept = _SWEPT.setdefault(model, {})
    key = json.dumps([covariance.layers, covariance.source], sort_keys=True)  # weights too, edits aside
    if key not in swept:
        swept[key] = layer_sweep(model, tokenizer, covariance=covariance, progress=True)
    return swept[key]


def candidate_layers(anatomy: Anatomy) -> list[int]:
    """Five depths from a tenth to half of a model, at which a covariance is fitted for a sweep; fewer in one of few blocks.

    Args:
        anatomy: of the model.

    Example:
        >>> candidate_layers(steer.Anatomy.find(model))
        [3, 6, 9, 12, 14]
    """
    return sorted({round(share * (anatomy.n_layers - 1)) for share in _CANDIDATES})


def _size(anatomy: Anatomy) -> tuple[str, int, int]:
    return anatomy.kind, anatomy.n_layers, anatomy.width


_CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5)
# by layers, weights and texts of the covariance
_SWEPT: weakref.WeakKeyDictionary[nn.Module, dict[str, LayerSweep]] = weakref.WeakKeyDictionary()


# ---- errors


def _not_known(anatomy: Anatomy) -> EditError:
    depth = anatomy.n_layers
    return EditError(
        f"no layers are known that suit edits of this {anatomy.kind} of {depth} blocks and width {anatomy.width}",
        expected="layers=[...], or a covariance of several layers to choose from",
        found="neither",
        remedy=f"pass layers; {depth // 6} to {depth // 3} is where most publications edit a model of this depth",
    )
