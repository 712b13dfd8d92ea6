"""Which tokens of the batch in hand are the response, for forward passes that are not told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.context import ForwardContext
from steer.model.hooks import Watcher, watcher_of


def response_mask(batch: Any) -> Tensor | None:
    """[rows, tokens] bool, read off `labels` (-100 elsewhere), a completion mask (TRL; without a tool's tokens) or assistant masks.

    None when the batch is no mapping, or has none of them.
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.dtype.is_floating_point:
        return labels != -100
    for name in ("completion_mask", "assistant_masks"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            tool = batch.get("tool_mask")
            return mask.bool() if tool is None or name != "completion_mask" else (mask * tool).bool()
    return None


class ResponseHint:
    """Fills in the response tokens of passes that carry no labels: a loss of one's own, DPO, GRPO.

    Weaker than labels and than `steer.response_tokens`: it is left out where it does not fit, because a step may run other rows than its
    batch (a generation, two halves of a pair). A scope that needs it then says so with a ContextError.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._watcher: Watcher | None = None

    def install(self, model: nn.Module) -> None:
        """Joins the watcher of a model that a plan or a tracker is attached to."""
        self._watcher = watcher_of(model)
        if self._watcher is not None:
            self._watcher.on_open.insert(0, self)  # before those who read the context

    def remove(self) -> None:
        self.mask = None
        if self._watcher is not None:
            self._watcher.on_open.remove(self)
            self._watcher = None

    def show(self, batch: Any) -> None:
        """The batch that the next passes belong to; None when it is done."""
        self.mask = response_mask(batch)

    def __call__(self, ctx: ForwardContext) -> None:
        mask = self.mask
        if mask is None or ctx.labelled is not None or ctx.phase == "generate":
            return
        missing = ctx.tokens - mask.shape[1]
        # GRPO's mask covers the completion only, which stands at the right end
        if mask.shape[0] == ctx.batch and missing >= 0:
            ctx.labelled = torch.nn.functional.pad(mask, (missing, 0)) if missing else mask
