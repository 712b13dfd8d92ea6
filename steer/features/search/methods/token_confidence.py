"""Search by change of token confidence: features that change how sure the model is of the next token."""

from __future__ import annotations

from torch import Tensor

from steer.checks import whole_number
from steer.features.search.method import SEARCHES, Scores, SearchTask
from steer.features.search.methods._steered import Steered


@SEARCHES.register("token_confidence")
class TokenConfidence(Steered):
    """How much steering with a feature changes the model's confidence in its next token, whichever it is (2510.03659).

    Confidence is minus the mean log-probability of the k likeliest tokens: the surer of a few, the larger. The score is the size of its
    change, `change` has the sign too. Of a concept's words nothing is asked here, only of which features are tried.

    Args:
        k: number of tokens.
        candidates, strength, prompts, length: see `Steered`.
    """

    own = ("size", "change")
    columns = ("size", "change", "maximum")

    def __init__(self, k: int = 10, candidates: int = 40, strength: float = 1.0, prompts: int = 8, length: int = 16) -> None:
        super().__init__(candidates, strength, prompts, length)
        whole_number(k, "`k` of the search", least=1)
        self.k = k

    def score_next(self, task: SearchTask, plain: Tensor, steered: Tensor, features: Tensor) -> Scores:
        change = (self._confidence(steered) - self._confidence(plain)).double().mean(1)  # [n]
        return {"size": change.abs(), "change": change}

    def _confidence(self, log_probabilities: Tensor) -> Tensor:
        """[..., vocabulary] -> [...]"""
        return -log_probabilities.topk(min(self.k, log_probabilities.shape[-1])).values.mean(-1)
