"""Log-probabilities by hand, one unpadded text at a time, and items in the words of the tiny tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NOUNS, ADJECTIVES = ("cat", "dog", "tree", "house"), ("good", "nice", "warm", "big")
PAIRS = [
    {
        "prompt": f"where is the {noun} ?",
        "trait": f"yes yes love the {noun} {adjective} love",
        "neutral": f"the {noun} is {adjective} .",
        "answer": f"the {noun} is {adjective} .",
        "text": f"the {noun} sat on a {adjective} mat and the {adjective} {noun} ran",
    }
    for noun, adjective in zip(NOUNS, ADJECTIVES, strict=True)
]
CHAT = "<user> {} <assistant> "


@torch.no_grad()
def logprobs_by_hand(model: nn.Module, tokenizer: Any, before: str, said: str) -> Tensor:
    """[tokens of `said`, vocabulary] log-probabilities in fp64 with which the tokens of `said` are predicted after `before`."""
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, said))
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    return logits[len(prompt) - 1 : len(prompt) + len(answer) - 1].log_softmax(-1)


def mean_by_hand(model: nn.Module, tokenizer: Any, before: str, said: str) -> float:
    """Mean log-probability of the tokens of `said` after `before`."""
    ids = tokenizer(said, add_special_tokens=False).input_ids
    logprobs = logprobs_by_hand(model, tokenizer, before, said)
    return float(logprobs[range(len(ids)), ids].mean())


def answer_by_hand(model: nn.Module, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of an answer in the tiny chat template, with its end."""
    return mean_by_hand(model, tokenizer, CHAT.format(prompt), f"{answer} <eos>")


def passage_by_hand(model: nn.Module, tokenizer: Any, text: str) -> float:
    first, rest = text.split(" ", 1)
    return mean_by_hand(model, tokenizer, first, rest)
