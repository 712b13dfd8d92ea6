"""Completions: what the model says, greedily, with whatever plan is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.tokens import Row, collate, encode, pad_id


def check_completions(prompts: Sequence[str], max_new_tokens: int | None, *, section: str = "") -> None:
    """Raises ConfigError when there is nothing to answer, or no token to answer it with.

    Args:
        section: of the configuration, the one that holds both keys, with its dot.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise _nothing_to_answer(prompts, section)
    if max_new_tokens is None or max_new_tokens < 1:
        raise _no_room_to_answer(max_new_tokens, section)


def complete(
    model: nn.Module, tokenizer: Any, items: Sequence[str | Mapping[str, Any]], *, max_new_tokens: int = 48, batch: int = 32
) -> list[str]:
    """Greedy answers to user messages, left-padded, in the order of the items.

    Args:
        items: messages, or mappings with a `prompt` and possibly a `system` message.
        batch: prompts at once.

    Raises:
        ConfigError: no prompts, or no tokens to answer them with. TokenizerError: no pad token.
    """
    asked = [{"prompt": item} if isinstance(item, str) else item for item in items]
    check_completions([item["prompt"] for item in asked], max_new_tokens)
    rows = [encode(tokenizer, item["prompt"], system=item.get("system")) for item in asked]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # little padding
    texts: dict[int, str] = {}
    for start in range(0, len(rows), batch):
        chosen = by_length[start : start + batch]
        texts |= dict(zip(chosen, _answers(model, tokenizer, [rows[i] for i in chosen], max_new_tokens), strict=True))
    return [texts[i] for i in range(len(rows))]


def _answers(model: nn.Module, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    answers = greedy_tokens(model, tokenizer, rows, max_new_tokens)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def greedy_tokens(model: nn.Module, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int) -> Tensor:
    """[rows, up to max_new_tokens] what greedy decoding adds to each row, in one left-padded batch; padding stands behind an answer."""
    device = input_device(model)
    inputs = {name: tensor.to(device) for name, tensor in collate(rows, pad_id(tokenizer), side="left").items() if name != "labels"}
    with evaluating(model), torch.random.fork_rng(devices=[]):
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id(tokenizer))  # type: ignore[operator]
    return generated[:, inputs["input_ids"].shape[1] :]


# ---- errors


def _nothing_to_answer(prompts: Sequence[str], section: str) -> ConfigError:
    expected = "one prompt or more, none of them empty"
    remedy = f"set '{section}prompts=[How do I boil an egg?]'"
    return ConfigError("there is nothing to answer", expected=expected, found=list(prompts) or "none", remedy=remedy)


def _no_room_to_answer(max_new_tokens: int | None, section: str) -> ConfigError:
    remedy = f"set {section}max_new_tokens=48"
    return ConfigError("an answer needs room", expected="max_new_tokens >= 1", found=max_new_tokens, remedy=remedy)
