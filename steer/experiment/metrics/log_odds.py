"""Log-odds of two next words behind a prompt: how far a word moves them, how large they are, or on which side they are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

from steer.bias.scoring import Scorer
from steer.checks import one_of
from steer.experiment.metric import METRICS, Item, ReadingMetric

SHIFT, ODDS, ACCURACY = READS = ("shift", "odds", "accuracy")


@METRICS.register("log_odds")
class LogOdds(ReadingMetric):
    """Log-odds of `first` against `second` behind `prompt`, running text without a chat template.

    Args:
        reads: `shift`, the size of their difference from those behind `baseline`; `odds`, what they are; `accuracy`, 1 where `first` is the
            likelier and 0 elsewhere.

    Example:
        >>> # in a configuration: {metric: log_odds, reads: shift, data: occupations_test}, with lines such as
        >>> # {"prompt": "The nurse said that", "baseline": "The person said that", "first": " he", "second": " she"}
    """

    def __init__(self, reads: str = SHIFT) -> None:
        self.reads = one_of(reads, READS, "`reads` of log_odds")
        self.unit = "" if reads == ACCURACY else "nat"
        self.keys = ("prompt", "first", "second", *(("baseline",) if reads == SHIFT else ()))

    @property
    def read(self) -> Hashable:
        return type(self), self.reads == SHIFT  # odds and accuracy are of the same numbers

    def reading(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        scorer = Scorer(model, tokenizer, progress=False)

        def odds(key: str) -> list[float]:
            prompts = [f"{item['system']}\n\n{item[key]}" if item.get("system") else item[key] for item in items]
            asked = [(prompt, item["first"], item["second"]) for prompt, item in zip(prompts, items, strict=True)]
            once = list(dict.fromkeys(asked))  # a baseline is that of many items
            found = scorer.log_odds([prompt for prompt, *_ in once], [(a, b) for _, a, b in once], what="log-odds").tolist()
            values = dict(zip(once, found, strict=True))
            return [values[each] for each in asked]

        values = odds("prompt")
        if self.reads == SHIFT:
            values = [value - of_baseline for value, of_baseline in zip(values, odds("baseline"), strict=True)]
        return {item["id"]: value for item, value in zip(items, values, strict=True)}

    def value(self, read: float) -> float:
        if self.reads == SHIFT:
            return abs(read)
        return float(read > 0) if self.reads == ACCURACY else read
