"""Layers that are edited by default: those of the publications, or that were measured here. Causal tracing does not choose them well.

Hase et al. 2023 (arXiv 2301.04213): where tracing finds a fact says next to nothing about where it is best edited.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from steer.edits.covariance import Covariance
from steer.edits.edited_map import edited_maps
from steer.errors import EditError
from steer.model.anatomy import Anatomy

MOST = 5  # layers that an edit is spread over

# (model type, layers, width): the one layer of ROME, and those of MEMIT
PUBLISHED: dict[tuple[str, int, int], tuple[int, tuple[int, ...]]] = {
    ("gpt2", 24, 1024): (8, (3, 4, 5, 6, 7, 8)),  # medium; ROME's, and as many layers below
    ("gpt2", 36, 1280): (12, (8, 9, 10, 11, 12)),
    ("gpt2", 48, 1600): (17, (13, 14, 15, 16, 17)),
    ("gptj", 28, 4096): (5, (3, 4, 5, 6, 7, 8)),
    ("gpt_neox", 44, 6144): (15, (6, 7, 8, 9, 10)),
    ("llama", 32, 4096): (5, (4, 5, 6, 7, 8)),  # Llama 2 7B, Llama 3 8B
    ("llama", 30, 576): (8, (4, 5, 6, 7, 8)),  # SmolLM2-135M, measured: docs/results/editing.md
}


def default_layers(model: nn.Module, tokenizer: Any, covariance: Covariance | None, *, several: bool) -> list[int]:
    """The layers for a model of a known family and size; for another one a sweep over the layers of a covariance, once in a process.

    Args:
        several: of an editor that spreads an edit over layers: the best layer and those of the covariance next below it, five at most.

    Raises:
        EditError: another model without a covariance, or one that says too little of what the sweep edits.
    """
    anatomy = Anatomy.find(model)
    key = (anatomy.kind, anatomy.n_layers, anatomy.width)
    if key in PUBLISHED:
        one, many = PUBLISHED[key]
        return list(many) if several else [one]
    if covariance is None:
        raise _not_known(anatomy)
    if len(covariance.layers) == 1:
        return covariance.layers
    from steer.edits.layer_sweep import layer_sweep  # late: it makes edits

    swept = _SWEPT.setdefault(model, {})
    layers = tuple(covariance.layers)
    if layers not in swept:
        swept[layers] = layer_sweep(model, tokenizer, covariance=covariance).best
    best = swept[layers]
    post_norm = any(edited.has_post_norm for edited in edited_maps(anatomy, [best]))
    below = [layer for layer in layers if layer <= best][-MOST:]
    return below if several and not post_norm else [best]


_SWEPT: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = weakref.WeakKeyDictionary()  # by layers of the covariance


# ---- errors


def _not_known(anatomy: Anatomy) -> EditError:
    depth = anatomy.n_layers
    return EditError(
        f"no layers are known that suit edits of this {anatomy.kind} of {depth} blocks and width {anatomy.width}",
        expected="layers=[...], or a covariance of several layers to choose from",
        found="neither",
        remedy=f"pass layers; {depth // 6} to {depth // 3} is where most publications edit a model of this depth",
    )
