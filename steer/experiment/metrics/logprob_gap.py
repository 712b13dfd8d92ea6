"""Log-probability gap: how much likelier one of two given answers is, judge-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steer.experiment.metric import METRICS, Item, Metric, encoded, item_key
from steer.model.likelihood import response_logprobs
from steer.model.tokens import pad_id


@METRICS.register("logprob_gap")
class LogProbGap(Metric):
    """Mean log-probability per token of one answer minus that of another to the same prompt.

    Args:
        answer, other: keys of the two answers in an item.
    """

    unit = "nat/token"

    def __init__(self, answer: str = "trait", other: str = "neutral") -> None:
        self.answer = item_key(answer, "answer")
        self.other = item_key(other, "other")
        self.keys = ("prompt", answer, other)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        pad = pad_id(tokenizer)
        of_answer, of_other = (
            response_logprobs(model, [encoded(tokenizer, item, item[key]) for item in items], pad=pad) for key in (self.answer, self.other)
        )
        return dict(zip([item["id"] for item in items], (of_answer - of_other).tolist(), strict=True))
