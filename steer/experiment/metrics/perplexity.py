"""Perplexity of plain passages, as its logarithm: damage to what a model knew of running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steer.experiment.metric import LOWER, METRICS, Item, Metric, item_key, passage
from steer.model.likelihood import response_logprobs
from steer.model.tokens import pad_id


@METRICS.register("perplexity")
class Perplexity(Metric):
    """Log-perplexity of a passage: mean negative log-probability per token, in nat, not its exponential.

    -1/T sum_t log p(x_t | x_<t) over all tokens but the first, which is predicted from nothing. Differences of two models in nat are
    symmetric and do not hang on one hard passage, which is what paired statistics need; exp of a mean over items is the perplexity
    (exp 3.0 = 20.1), and exp of a difference the factor by which it grew.

    Args:
        text: key of the passage in an item.
    """

    unit = "nat/token"
    better = LOWER

    def __init__(self, text: str = "text") -> None:
        self.text = item_key(text, "text")
        self.keys = (text,)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        logprobs = response_logprobs(model, [passage(tokenizer, item, self.text) for item in items], pad=pad_id(tokenizer))
        return dict(zip([item["id"] for item in items], (-logprobs).tolist(), strict=True))
