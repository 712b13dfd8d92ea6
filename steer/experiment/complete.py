"""Completions: what the model says, greedily, with whatever plan is attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steer.model.capture import evaluating
from steer.model.tokens import collate, encode, pad_id


def complete(model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers to user messages, as one left-padded batch.

    Raises:
        TokenizerError: no pad token.
    """
    batch = collate([encode(tokenizer, prompt) for prompt in prompts], pad_id(tokenizer), side="left")
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with evaluating(model), torch.random.fork_rng(devices=[]):
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id(tokenizer))  # type: ignore[operator]
    return [text.strip() for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
