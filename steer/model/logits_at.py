"""Logits at some tokens: the unembedding, the largest map of a small model, is asked for these alone."""

from __future__ import annotations

from collections.abc import Callable
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


def _unembedding(model: nn.Module) -> nn.Module | None:
    """The unembedding of a model that tells, where its forward may be replaced."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None or any(map(is_compiled, model.modules())) else get()
    return head if isinstance(head, nn.Module) else None


def _in_float32(head: nn.Module) -> Callable[..., Tensor]:
    """Its forward, outside of autocast where its weights are float32."""
    forward = head.forward

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = hidden.device.type
        if not torch.is_autocast_enabled(kind) or any(each.dtype != torch.float32 for each in head.parameters()):
            return forward(hidden, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return forward(hidden.float(), *args, **kwargs)

    return run


def logits_at(model: nn.Module, head: nn.Module | None, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """Runs a model and gives its logits at chosen tokens, [n, vocabulary]; differentiable.

    Under autocast the unembedding alone stays in float32: logits of 20 in bfloat16 are 1/8 apart, and next words would tie.

    Args:
        head: the unembedding; None makes the logits of all tokens first.
        inputs: the arguments of the pass, on the device that they belong on.
        columns: [n] indices into the tokens of all rows, one row after the other; n may be 0.
    """
    whole = head if head is not None else _unembedding(model)
    forward = None if whole is None else _in_float32(whole)

    def gathered(hidden: Tensor) -> Tensor:
        assert forward is not None
        return forward(hidden.flatten(0, -2)[columns.to(hidden.device)][None])  # [1, n, vocabulary]

    forwards = {} if whole is None or forward is None else {whole: forward if head is None else gathered}
    with replaced_forwards(forwards):
        logits = model(**inputs).logits
    if head is not None and logits.shape[:2] == (1, len(columns)):
        return logits[0]
    return logits.flatten(0, 1)[columns.to(logits.device)]
