"""Completions: what the model says, greedily, with whatever plan is attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steer.errors import ConfigError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.tokens import collate, encode, pad_id


def check_completions(prompts: Sequence[str], max_new_tokens: int | None, *, section: str = "") -> None:
    """Raises ConfigError when there is nothing to answer, or no token to answer it with.

    Args:
        section: of the configuration, the one that holds both keys, with its dot.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise _nothing_to_answer(prompts, section)
    if max_new_tokens is None or max_new_tokens < 1:
        raise _no_room_to_answer(max_new_tokens, section)


def complete(model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers to user messages, as one left-padded batch.

    Raises:
        ConfigError: no prompts, or no tokens to answer them with. TokenizerError: no pad token.
    """
    check_completions(prompts, max_new_tokens)
    batch = collate([encode(tokenizer, prompt) for prompt in prompts], pad_id(tokenizer), side="left")
    device = input_device(model)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with evaluating(model), torch.random.fork_rng(devices=[]):
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id(tokenizer))  # type: ignore[operator]
    answers = generated[:, inputs["input_ids"].shape[1] :]  # [prompts, up to max_new_tokens]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


# ---- errors


def _nothing_to_answer(prompts: Sequence[str], section: str) -> ConfigError:
    expected = "one prompt or more, none of them empty"
    remedy = f"set '{section}prompts=[How do I boil an egg?]'"
    return ConfigError("there is nothing to answer", expected=expected, found=list(prompts) or "none", remedy=remedy)


def _no_room_to_answer(max_new_tokens: int | None, section: str) -> ConfigError:
    remedy = f"set {section}max_new_tokens=48"
    return ConfigError("an answer needs room", expected="max_new_tokens >= 1", found=max_new_tokens, remedy=remedy)
