"""Explainer: a function of your own."""

from __future__ import annotations

from collections.abc import Callable

from steer.features.reading.card import FeatureCard
from steer.features.reading.explainer import EXPLAINERS, Explainer


@EXPLAINERS.register("function")
class Function(Explainer):
    """What a Python function says of a `FeatureCard`: a model of your own, a table, a person who is asked.

    Args:
        call: the function.
    """

    def __init__(self, call: Callable[[FeatureCard], str]) -> None:
        self.call = call

    def explain(self, card: FeatureCard) -> str:
        return self.call(card)

    def described(self) -> str:
        return f"the function {getattr(self.call, '__qualname__', type(self.call).__name__)}"
