"""Logits at some tokens: the unembedding, the largest map of a small model, is asked for these alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.hook_registration import is_compiled
from steer.model.prefix import is_sharded, looks, replaced_forwards


def lone_head(model: nn.Module, head: nn.Module | None) -> nn.Module | None:
    """The unembedding, for `logits_at`, where nothing but a pass through `model` gets its output; else None, and all logits are made."""
    path = next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
    if head is None or not path or is_sharded(model):
        return None
    parts = path.split(".")
    around = [head, *(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))]
    hooks = [hook for module in around for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    is_wrapped = any("forward" in vars(module) for module in around)
    return None if is_wrapped or any(map(is_compiled, model.modules())) or any(map(looks, hooks)) else head


def logits_at(model: nn.Module, head: nn.Module | None, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """Runs a model and gives its logits at chosen tokens, [n, vocabulary]; differentiable.

    Under autocast the unembedding alone stays in float32: logits of 20 in bfloat16 are 1/8 apart, and next words would tie.

    Args:
        head: the unembedding; None makes the logits of all tokens first.
        inputs: the arguments of the pass, on the device that they belong on.
        columns: [n] indices into the tokens of all rows, one row after the other; n may be 0.
    """
    forward = head.forward if head is not None else None

    def gathered(hidden: Tensor) -> Tensor:
        assert forward is not None and head is not None
        chosen = hidden.flatten(0, -2)[columns.to(hidden.device)][None]  # [1, n, width]
        if not torch.is_autocast_enabled(hidden.device.type) or any(each.dtype != torch.float32 for each in head.parameters()):
            return forward(chosen)  # [1, n, vocabulary]
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(chosen.float())

    with replaced_forwards({head: gathered}) if head is not None else nullcontext():
        logits = model(**inputs).logits
    if head is not None and logits.shape[:2] == (1, len(columns)):
        return logits[0]
    return logits.flatten(0, 1)[columns.to(logits.device)]
