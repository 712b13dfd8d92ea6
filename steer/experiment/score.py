"""Judge-free measures: log-probabilities of given texts, one number a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.errors import NonFiniteError
from steer.model.capture import batches, evaluating
from steer.model.hooks import response_tokens
from steer.model.tokens import Row, collate


def response_logprobs(model: nn.Module, rows: Sequence[Row], *, pad: int, max_tokens: int = 2048) -> Tensor:
    """Mean log-probability per response token, in nat.

    A plan that is attached stays in force; the response tokens are announced to it.

    Args:
        model: a causal language model.
        rows: texts with at least one response token each.
        pad: any token id.
        max_tokens: padded tokens per batch.

    Returns:
        [len(rows)] fp64, in the order of `rows`.

    Raises:
        NonFiniteError: the model's output is NaN or infinite.
    """
    device = next(model.parameters()).device
    scores = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], pad).items()}
            labels = batch.pop("labels")
            with response_tokens(model, labels != -100):
                logits = model(**batch, use_cache=False).logits
            targets = labels[:, 1:]
            wanted = targets != -100
            picked = logits[:, :-1][wanted].float().log_softmax(-1).gather(-1, targets[wanted][:, None])[:, 0]
            total = torch.zeros(wanted.shape, device=device).masked_scatter(wanted, picked).sum(1)
            scores[chosen] = (total / wanted.sum(1)).double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(
            "log-probabilities are not finite",
            expected="a finite number for each text",
            found=f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} are NaN or infinite",
            remedy="the model diverged: lower the learning rate or the strength",
        )
    return scores


@dataclass(frozen=True)
class Suite:
    """Held-out texts, tokenised once.

    Attributes:
        styled, neutral: two answers to each prompt, with and without the trait, of the same content.
        texts: plain passages.
    """

    styled: list[Row]
    neutral: list[Row]
    texts: list[Row]


def measure(model: nn.Module, suite: Suite, *, pad: int) -> dict[str, Tensor]:
    """All measures of one arm.

    Returns:
        behaviour_gap: [prompts] log-probability of the styled minus that of the neutral answer, nat per token.
        task_logprob: [prompts] log-probability of the neutral answer, nat per token.
        neutral_loss: [texts] negative log-probability of plain passages, nat per token.
    """
    styled, neutral = (response_logprobs(model, rows, pad=pad) for rows in (suite.styled, suite.neutral))
    return {
        "behaviour_gap": styled - neutral,
        "task_logprob": neutral,
        "neutral_loss": -response_logprobs(model, suite.texts, pad=pad),
    }
