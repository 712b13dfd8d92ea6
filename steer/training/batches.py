"""Response mask of the training batch, for forward passes that are not told which tokens are the response."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.context import ForwardContext
from steer.model.watcher import Watcher, watcher_of


def response_mask(batch: Any) -> Tensor | None:
    """Response mask of a batch: `labels` other than -100, TRL's `completion_mask` without a tool's tokens, or `assistant_masks`.

    Returns:
        [rows, tokens] bool; None when the batch is no mapping, or has none of these.
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.dtype.is_floating_point:
        return labels != -100  # [rows, tokens]
    for name in ("completion_mask", "assistant_masks"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            tool = batch.get("tool_mask")
            return mask.bool() if tool is None or name != "completion_mask" else (mask * tool).bool()  # [rows, tokens]
    return None


class BatchResponseMask:
    """Response mask of the batch that is being run, filled into passes that carry no labels: a loss of one's own, DPO, GRPO.

    Labels and `steer.response_tokens` take precedence. The mask is left out where it does not fit, because a step may run other rows than
    its batch (a generation, two halves of a pair). A scope that needs it then raises ContextError.

    Attributes:
        mask: [rows, tokens] bool, None between batches and for batches that have none.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._watcher: Watcher | None = None

    def install(self, model: nn.Module) -> None:
        """Joins the watcher of a model that a plan or a tracker is attached to."""
        self._watcher = watcher_of(model)
        if self._watcher is not None:
            self._watcher.amend.append(self)

    def remove(self) -> None:
        """Leaves the watcher."""
        self.mask = None
        if self._watcher is not None:
            if self in self._watcher.amend:  # it is not when an interrupt came before, or when this is done again
                self._watcher.amend.remove(self)
            self._watcher = None

    def read(self, batch: Any) -> None:
        """Takes the mask of the batch that the next passes belong to."""
        self.mask = response_mask(batch)

    def clear(self) -> None:
        """Forgets the mask: the next passes belong to no batch."""
        self.mask = None

    def __call__(self, ctx: ForwardContext) -> ForwardContext:
        """The context of a pass that opens, with the mask where it has none and this one fits."""
        mask = self.mask
        if mask is None or ctx.labelled is not None or ctx.phase == "generate":
            return ctx
        n_missing = ctx.tokens - mask.shape[1]
        if mask.shape[0] != ctx.batch or n_missing < 0:
            return ctx
        # GRPO's mask covers the completion only, which stands at the right end
        labelled = torch.nn.functional.pad(mask, (n_missing, 0)) if n_missing else mask  # [batch, tokens]
        return dataclasses.replace(ctx, labelled=labelled)
