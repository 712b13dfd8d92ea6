"""Repetition in generated text: does an edit make a model loop?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.checks import whole_number
from steer.experiment.metric import LOWER, METRICS, GenerationMetric, Item


@METRICS.register("repetition")
class Repetition(GenerationMetric):
    """Repeated n-grams in an answer, as a share of all: 1 - unique n-grams / n-grams, over the tokens of the text.

    seq-rep-n of Welleck et al. 2019, Neural text generation with unlikelihood training. Nothing can repeat in an answer of fewer than n
    tokens, which counts 0: look at the length of the answers too.

    Args:
        n: tokens of an n-gram.
        max_new_tokens: length of an answer; the share grows with it.
    """

    better = LOWER

    def __init__(self, n: int = 4, max_new_tokens: int = 48) -> None:
        super().__init__(max_new_tokens)
        whole_number(n, "n of 'repetition'", least=1)
        self.n = n

    def scores(self, items: Sequence[Item], texts: Sequence[str], tokenizer: Any) -> Mapping[str, float]:
        ids = [tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in texts]
        return {item["id"]: repeated(tokens, self.n) for item, tokens in zip(items, ids, strict=True)}


def repeated(tokens: Sequence[Any], n: int) -> float:
    """Share of n-grams that stood in the sequence before."""
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return (len(ngrams) - len(set(ngrams))) / len(ngrams) if ngrams else 0.0
