"""Explainer: the words at which a feature is largest."""

from __future__ import annotations

from collections import Counter

from steer.checks import whole_number
from steer.features.reading.card import FeatureCard
from steer.features.reading.explainer import EXPLAINERS, Explainer


@EXPLAINERS.register("peak_words")
class PeakWords(Explainer):
    """The tokens at the peaks of a feature's largest examples, the commonest first; no model is needed.

    Args:
        count: of tokens.
    """

    def __init__(self, count: int = 3) -> None:
        whole_number(count, "`count` of the explainer", least=1)
        self.count = count

    def explain(self, card: FeatureCard) -> str:
        tokens = [example.tokens[example.peak] for example in card.examples if example.is_top]
        peaks = Counter(token.strip() or repr(token) for token in tokens)
        return ", ".join(word for word, _ in peaks.most_common(self.count))

    def described(self) -> str:
        return "the commonest tokens at the peaks of the largest examples"
