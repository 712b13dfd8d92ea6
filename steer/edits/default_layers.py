"""Layers that are edited by default: those of the publications, or that were measured here. Causal tracing does not choose them well.

Hase et al. 2023 (arXiv 2301.04213): where tracing finds a fact says next to nothing about where it is best edited.
"""

from __future__ import annotations

from steer.errors import EditError
from steer.model.anatomy import Anatomy

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


def default_layers(anatomy: Anatomy, *, several: bool) -> list[int]:
    """The layers for a model of a known family and size. several: of an editor that spreads an edit over layers.

    Raises:
        EditError: another model.
    """
    key = (anatomy.kind, anatomy.n_layers, anatomy.width)
    if key not in PUBLISHED:
        raise _not_known(anatomy)
    one, many = PUBLISHED[key]
    return list(many) if several else [one]


# ---- errors


def _not_known(anatomy: Anatomy) -> EditError:
    depth = anatomy.n_layers
    return EditError(
        f"no layers are known that suit edits of this {anatomy.kind} of {depth} blocks and width {anatomy.width}",
        expected="layers=[...]",
        found="none",
        remedy=f"let steer.edits.layer_sweep choose, on a few facts; layers {depth // 6} to {depth // 3} are where most publications edit",
    )
