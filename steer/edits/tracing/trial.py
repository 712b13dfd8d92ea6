"""Trial of the fast passes: whether a model gives in them what it gives in whole passes, on a few cells of the prompt at hand."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from steer.edits.tracing.cells import Cell, Restoring
from steer.edits.tracing.fast import FastPasses
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.plain import plain_logits
from steer.edits.tracing.prompts import TracedPrompt
from steer.errors import SteerError
from steer.model.prefix import PROVEN, may_share, structure_of, windows_that_end

log = logging.getLogger("steer")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}  # of any probability, by dtype of the model
COARSE = 0.05  # for halves, whose rounding depends on the size of the batch


def record_for_fast(passes: Passes, prompt: TracedPrompt, corrupted: Tensor, restoring: Restoring, max_tokens: int) -> Record | None:
    """The record that fast passes over a prompt need; None where this model has to be traced by whole passes."""
    anatomy = passes.anatomy
    is_plain = anatomy.main is anatomy and anatomy.stack.own_call is None and anatomy.stack.axes == (0, 1, 2)
    if not is_plain or anatomy.unembedding is None or not may_share(passes.model):
        return None
    proven = PROVEN.setdefault(passes.model, set())
    try:
        way = ("causal trace", restoring.kinds, restoring.severed, structure_of(anatomy), windows_that_end(passes.anatomy, len(prompt.ids)))
        record = passes.record(prompt, corrupted, with_cache=True)
        agrees = way in proven or _agree(passes, prompt, corrupted, restoring, record, max_tokens)
    except SteerError:
        raise
    except Exception as error:  # a model may refuse a cache, or rows that masks were not made for, in any way
        log.info("causal tracing runs whole passes, since shorter ones failed: %s: %s", type(error).__name__, error)
        return None
    if not agrees:
        log.info("causal tracing runs whole passes, since shorter ones change the probabilities of this model")
        return None
    proven.add(way)
    return record


def _agree(passes: Passes, prompt: TracedPrompt, corrupted: Tensor, restoring: Restoring, record: Record, max_tokens: int) -> bool:
    fast = FastPasses(passes, prompt, restoring.severed, record, max_tokens=max_tokens)
    for cells in _trial_cells(prompt, restoring, passes.anatomy.n_layers):
        for batch, logits in fast.logits(cells):
            for cell, of_cell in zip(batch, logits, strict=True):
                plain = plain_logits(passes, prompt, corrupted, cell, restoring.severed, record)
                apart = float((plain.float().softmax(-1) - of_cell.float().softmax(-1)).abs().max())
                if not apart <= TOLERANCE.get(plain.dtype, COARSE):  # not for NaN
                    return False
    return True


def _trial_cells(prompt: TracedPrompt, restoring: Restoring, n_layers: int) -> list[list[Cell]]:
    """Cells of the first and a middle layer, at the last token of the subject and at one that has tokens before and behind it."""
    tokens = dict.fromkeys([prompt.last, (prompt.last + len(prompt.ids)) // 2])
    layers = {0, n_layers // 2}
    by_token = [[cell for cell in restoring.cells(token, n_layers) if cell.layer in layers and cell.joins < n_layers] for token in tokens]
    return [cells for cells in by_token if cells]
