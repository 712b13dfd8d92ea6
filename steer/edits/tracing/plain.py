"""Causal tracing by the plain protocol: one whole forward pass for each cell (Meng et al. 2022, arXiv 2202.05262, section 2.1).

It is what the fast passes are proven against, and what runs where they cannot be proven.
"""

from __future__ import annotations

from torch import Tensor

from steer.edits.tracing.cells import SEVERABLE, Cell, site_of
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.prompts import TracedPrompt
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site


def plain_logits(passes: Passes, prompt: TracedPrompt, corrupted: Tensor, cell: Cell, severed: str | None, record: Record) -> Tensor:
    """[samples, vocabulary] logits of the last token with a cell restored.

    The clean run is row 0 of the same pass, from which the others get what is restored.

    Args:
        corrupted: [samples, subject tokens, width] embeddings of the subject.
        severed: part whose outputs at the cell's token keep their corrupted values in all layers; None for none.
        record: of the corrupted runs, from which those values are.
    """
    functions: dict[Site, HookFunction] = {site_of(cell.kind, layer): _restored(cell.token) for layer in cell.layers}
    if severed in SEVERABLE:
        for layer in range(passes.anatomy.n_layers):
            site = site_of(severed, layer)
            functions[site] = _severed(cell.token, record.values[site][1:, cell.token])
    return passes.logits(prompt, corrupted, functions)[1:]


def _restored(token: int) -> HookFunction:
    def restore(h: Tensor, context: ForwardContext) -> Tensor:
        restored = h.clone()
        restored[1:, token] = h[0, token]
        return restored

    return restore


def _severed(token: int, corrupted: Tensor) -> HookFunction:
    """corrupted: [samples, width]."""

    def sever(h: Tensor, context: ForwardContext) -> Tensor:
        kept = h.clone()
        kept[1:, token] = corrupted.to(h.device)
        return kept

    return sever
