"""Search by logit weights: features whose decoder row promotes the words of the concept. The score is ours."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.logit_weights import logit_weights
from steer.features.search.method import SEARCHES, FeatureSearch, Scores, SearchTask


@SEARCHES.register("logit_weights")
class LogitWeights(FeatureSearch):
    """How far a feature's decoder row, read by the final norm and the unembedding, lifts the concept's words above all tokens.

    `z` is the mean logit of the words in standard deviations of the logits of all tokens, `rank` the place of the best word among all.
    """

    columns = ("z", "rank")
    needs = ("words",)

    def scores(self, task: SearchTask) -> dict[str, Scores]:
        ids = {concept: task.ids(concept) for concept in task.concepts}
        chosen = task.scored()
        parts = [_scored(logits, list(ids.values())) for _, logits in logit_weights(task.model, task.dictionary, chosen)]
        z, rank = (torch.cat([part[place] for part in parts]) for place in range(2))  # [features, concepts]
        found: dict[str, Scores] = {}
        for place, concept in enumerate(ids):
            at = slice(None) if task.features is None or chosen is None else torch.searchsorted(chosen, task.features[concept])
            found[concept] = {"z": z[at, place], "rank": rank[at, place]}
        return found


def _scored(logits: Tensor, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[n, concepts] mean standardised logit of the words, and place of the best of them, from 1."""
    mean, spread = logits.mean(1), logits.std(1).clamp_min(1e-12)
    z = torch.stack([(logits[:, words].mean(1) - mean) / spread for words in ids], 1)
    best = torch.stack([logits[:, words].amax(1) for words in ids], 1)
    rank = torch.stack([(logits > best[:, place, None]).sum(1) + 1 for place in range(len(ids))], 1)
    return z.double(), rank.double()
