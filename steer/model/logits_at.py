"""Logits at some tokens: the unembedding, the largest map of a small model, is asked for these alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from steer.model.prefix import replaced_forwards


def logits_at(model: nn.Module, head: nn.Module | None, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """Runs a model and gives its logits at chosen tokens, [n, vocabulary]; differentiable.

    Args:
        head: the unembedding; None makes the logits of all tokens first.
        inputs: the arguments of the pass, on the device that they belong on.
        columns: [n] indices into the tokens of all rows, one row after the other; n may be 0.
    """
    forward = head.forward if head is not None else None

    def gathered(hidden: Tensor) -> Tensor:
        assert forward is not None
        return forward(hidden.flatten(0, -2)[columns.to(hidden.device)][None])  # [1, n, vocabulary]

    with replaced_forwards({head: gathered}) if head is not None else nullcontext():
        logits = model(**inputs).logits
    if head is not None and logits.shape[:2] == (1, len(columns)):
        return logits[0]
    return logits.flatten(0, 1)[columns.to(logits.device)]
