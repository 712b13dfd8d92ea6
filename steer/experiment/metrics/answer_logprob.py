"""Log-probability of a given answer, judge-free: does a model still give the answers that it should?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steer.experiment.metric import HIGHER, METRICS, Item, Metric, encoded, item_key
from steer.model.likelihood import response_logprobs
from steer.model.tokens import pad_id


@METRICS.register("answer_logprob")
class AnswerLogProb(Metric):
    """Mean log-probability per token of a given answer to a prompt, its end-of-turn mark included.

    Args:
        answer: key of the answer in an item. Higher is better as long as it is an answer that the model should give.
    """

    unit = "nat/token"
    better = HIGHER

    def __init__(self, answer: str = "answer") -> None:
        self.answer = item_key(answer, "answer")
        self.keys = ("prompt", answer)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        logprobs = response_logprobs(model, [encoded(tokenizer, item, item[self.answer]) for item in items], pad=pad_id(tokenizer))
        return dict(zip([item["id"] for item in items], logprobs.tolist(), strict=True))
