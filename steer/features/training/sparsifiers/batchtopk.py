"""BatchTopK in training (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.activation import Activation
from steer.features.activations.batchtopk import BatchTopK
from steer.features.training.sparsifier import SPARSIFIERS, Sparsifier, Step


@SPARSIFIERS.register("batchtopk")
class BatchTopKSparsifier(Sparsifier):
    """The k x tokens largest pre-activations of a batch, above 0; afterwards one threshold, the running mean of the smallest one kept.

    Args:
        memory: share of the running threshold that a step keeps.
    """

    threshold: Tensor  # [] buffer

    def __init__(self, width: int, k: int, memory: float = 0.98) -> None:
        super().__init__(width, k)
        self.memory = memory
        self.register_buffer("threshold", torch.tensor(-1.0))  # none so far

    def active(self, pre: Tensor, step: Step) -> Tensor:
        # all but a few candidates are far below the last threshold: no need to rank them
        for floor in (max(0.8 * float(self.threshold), 0.0), 0.0):
            index = (pre > floor).flatten().nonzero()[:, 0]
            found = pre.flatten()[index]
            of_all = step.gathered(found)
            count = round(step.k * step.tokens)
            if len(of_all) >= count:
                return index[found >= of_all.kthvalue(len(of_all) - count + 1).values]
        return index

    def observe(self, values: Tensor, l0: float, step: Step) -> None:
        of_all = step.gathered(values.amin()[None] if len(values) else values)
        if len(of_all):
            smallest = of_all.amin()
            self.threshold.copy_(smallest if self.threshold < 0 else self.memory * self.threshold + (1 - self.memory) * smallest)

    def activation(self) -> Activation:
        return BatchTopK(self.threshold.detach().clamp_min(0).clone(), self.k)
