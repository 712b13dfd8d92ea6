"""Judge-free measures: log-probabilities of given texts, one number a text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from steer.model.likelihood import response_logprobs
from steer.model.tokens import Row


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
