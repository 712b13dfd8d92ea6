"""Loss of a model on texts, in nats for each text, and the paired change between two measurements with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from steer.errors import ConfigError, NonFiniteError
from steer.model.likelihood import first_predicted, summed_logprobs
from steer.model.tokens import Row

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class TextLosses:
    """Of each text.

    Attributes:
        nats: [texts] fp64 in all. tokens: [texts] how many were predicted.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class LossChange:
    """Change of the loss, nats per token.

    Attributes:
        value: after less before. low, high: 95 % interval over texts; NaN for one text.
        before: loss. texts, tokens: that it is over.
    """

    value: float
    low: float
    high: float
    before: float
    texts: int
    tokens: int

    def __str__(self) -> str:
        interval = "too few texts for an interval" if math.isnan(self.low) else f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.value:+.4f} {interval} nats per token"

    def as_facts(self) -> dict[str, Any]:
        """JSON-able; an interval that there is not is left out."""
        facts: dict[str, Any] = {"value": self.value, "before": self.before, "texts": self.texts, "tokens": self.tokens}
        return facts if math.isnan(self.low) else {**facts, "low": self.low, "high": self.high}


def text_losses(model: nn.Module, rows: Sequence[Row], *, max_tokens: int = 2048) -> TextLosses:
    """Loss of each text's response, all but the first token of a text without a prompt. What is attached to the model stays in force.

    Args:
        max_tokens: padded tokens of a batch; one that does not fit into memory is halved.

    Raises:
        ConfigError: a text with no token to predict. NonFiniteError: the output of the model is NaN or infinite.
    """
    for number, row in enumerate(rows):
        if len(row.ids) <= first_predicted(row):
            raise _nothing_to_predict(number, row)
    sums, tokens = summed_logprobs(model, rows, pad=0, max_tokens=max_tokens)
    nats = -sums
    if not bool(torch.isfinite(nats).all()):
        raise _not_finite(nats)
    return TextLosses(nats, tokens)


def loss_change(before: TextLosses, after: TextLosses) -> LossChange:
    """The change on the same texts. Texts are drawn, not tokens: the interval is that of a ratio of sums over texts."""
    return _loss_change(*ratio_change(after.nats - before.nats, before.tokens), before)


def pooled_change(before: Sequence[TextLosses], after: Sequence[TextLosses]) -> LossChange:
    """The change over the tokens of several sources; texts vary within their source, and sources are not drawn."""
    together = TextLosses(torch.cat([each.nats for each in before]), torch.cat([each.tokens for each in before]))
    tokens = float(together.tokens.sum())
    value, variance, freedom = 0.0, 0.0, 0
    for old, new in zip(before, after, strict=True):
        share = float(old.tokens.sum()) / tokens
        of_source = float((new.nats - old.nats).sum() / old.tokens.sum())
        value += share * of_source
        variance += share**2 * _variance(new.nats - old.nats, old.tokens, of_source)
        freedom += len(old.tokens) - 1
    return _loss_change(value, _half(variance, freedom), together)


def _variance(change: Tensor, tokens: Tensor, value: float) -> float:
    """Of a ratio of sums over texts; NaN for one text."""
    count = len(tokens)
    left = change - value * tokens
    return float(left.square().sum() * count / (count - 1) / tokens.sum() ** 2) if count > 1 else math.nan


def ratio_change(change: Tensor, tokens: Tensor) -> tuple[float, float]:
    """A change per token, and half the width of its 95 % interval over texts; NaN for one text. change, tokens: [texts]."""
    value = float(change.sum() / tokens.sum())
    return value, _half(_variance(change, tokens, value), len(tokens) - 1)


def _half(variance: float, freedom: int) -> float:
    return float(student.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance) if freedom > 0 else math.nan


def _loss_change(value: float, half: float, before: TextLosses) -> LossChange:
    return LossChange(value, value - half, value + half, before.per_token, len(before.tokens), int(before.tokens.sum()))


# ---- errors


def _nothing_to_predict(number: int, row: Row) -> ConfigError:
    return ConfigError(f"text {number} has no token to predict", expected="at least one token after the first, or after its prompt",
                       found=repr(row), remedy="leave it out")  # fmt: skip


def _not_finite(nats: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "the loss of texts is not finite",
        expected="a finite number for each text",
        found=f"{int((~torch.isfinite(nats)).sum())} of {len(nats)} are NaN or infinite",
        remedy="lower the strength of what is attached",
    )
