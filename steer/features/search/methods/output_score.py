"""Search by output score: features that make the model say what their decoder row promotes."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.checks import whole_number
from steer.errors import ConfigError
from steer.features.logit_weights import logit_weights
from steer.features.search.method import SEARCHES, Scores, SearchTask
from steer.features.search.methods._steered import Steered


@SEARCHES.register("output_score")
class OutputScore(Steered):
    """Whether steering with a feature raises its own top logit-weight tokens: (1 - rank / vocabulary) times their probability (2505.20063).

    Rank and probability are those of the best of the tokens in the next-token distribution of the steered model, averaged over prompts.

    Args:
        tokens: number of the feature's top tokens.
        candidates, strength, prompts, length: see `Steered`.
    """

    own = ("output_score",)
    columns = ("output_score", "maximum")

    def __init__(self, tokens: int = 20, candidates: int = 40, strength: float = 1.0, prompts: int = 8, length: int = 16) -> None:
        super().__init__(candidates, strength, prompts, length)
        whole_number(tokens, "`tokens` of the search", least=1)
        self.tokens = tokens

    def score_next(self, task: SearchTask, plain: Tensor, steered: Tensor, features: Tensor) -> Scores:
        if self.tokens > plain.shape[-1]:
            raise _too_many_tokens(self.tokens, plain.shape[-1])
        top = torch.cat([logits.topk(self.tokens).indices for _, logits in logit_weights(task.model, task.dictionary, features)])
        own = steered.gather(2, top[:, None].expand(-1, steered.shape[1], -1))  # [n, prompts, tokens]
        best = own.amax(-1, keepdim=True)
        rank = (steered > best).sum(-1)  # [n, prompts]
        score = (1 - rank / steered.shape[-1]) * best[..., 0].exp()
        return {"output_score": score.double().mean(1)}


# ---- errors


def _too_many_tokens(tokens: int, vocabulary: int) -> ConfigError:
    expected = f"`tokens` of {vocabulary} at most, the size of the vocabulary"
    return ConfigError("a feature has fewer top tokens than are wanted", expected=expected, found=tokens, remedy="lower tokens=")
