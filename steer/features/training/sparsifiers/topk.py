"""TopK in training (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from torch import Tensor

from steer.features.activation import Activation
from steer.features.activations.topk import TopK
from steer.features.training.sparsifier import SPARSIFIERS, Sparsifier, Step


@SPARSIFIERS.register("topk")
class TopKSparsifier(Sparsifier):
    """The k largest pre-activations of each token, above 0, in training as afterwards."""

    def active(self, pre: Tensor, step: Step) -> Tensor:
        found, features = pre.topk(min(max(round(step.k), 1), self.width), dim=1)
        places = features + self.width * features.new_tensor(range(len(pre)))[:, None]  # [tokens, k]
        return places[found > 0].sort().values

    def activation(self) -> Activation:
        return TopK(self.k)
