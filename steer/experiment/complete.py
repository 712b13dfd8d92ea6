"""Completions: what the model says, greedily, with whatever plan is attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steer.errors import ConfigError
from steer.model.capture import evaluating
from steer.model.tokens import collate, encode, pad_id


def check_completions(prompts: Sequence[str], max_new_tokens: int | None, *, of: str = "") -> None:
    """Raises ConfigError when there is nothing to answer, or no token to answer it with.

    Args:
        of: the section of the configuration that holds both keys, with its dot.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        found, remedy = list(prompts) or "none", f"set '{of}prompts=[How do I boil an egg?]'"
        raise ConfigError("there is nothing to answer", expected="one prompt or more, none of them empty", found=found, remedy=remedy)
    if max_new_tokens is None or max_new_tokens < 1:
        remedy = f"set {of}max_new_tokens=48"
        raise ConfigError("an answer needs room", expected="max_new_tokens >= 1", found=max_new_tokens, remedy=remedy)


def complete(model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers to user messages, as one left-padded batch.

    Raises:
        ConfigError: no prompts, or no tokens to answer them with. TokenizerError: no pad token.
    """
    check_completions(prompts, max_new_tokens)
    batch = collate([encode(tokenizer, prompt) for prompt in prompts], pad_id(tokenizer), side="left")
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with evaluating(model), torch.random.fork_rng(devices=[]):
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id(tokenizer))  # type: ignore[operator]
    return [text.strip() for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
