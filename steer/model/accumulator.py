"""Accumulators: what takes the activations of a capture. A statistic is one class."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Accumulator(Protocol):
    """Takes the activations of one site, batch by batch."""

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes one batch. Tensors may be reused by the model afterwards: what is kept must be copied.

        Args:
            h: [batch, tokens, width] in the model's dtype, from the first to the last token at which any text of the batch has its span.
            weight: [batch, tokens], 1 on the span's tokens.
            rows: [batch] indices of the texts.
        """


class TextAccumulator:
    """Accumulator of a few numbers a text, which `capture` brings to the CPU once a batch: no pass waits for the device at every site.

    A subclass says which numbers these are (`reduce`) and what becomes of them (`add`).
    """

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, n] fp32 on the device of h, without waiting for it. Arguments as of `Accumulator.update`."""
        raise NotImplementedError

    def add(self, values: Tensor, rows: Tensor) -> None:
        """Takes what `reduce` gave for a batch, on the CPU, and the indices of its texts."""
        raise NotImplementedError

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes one batch at once, see `Accumulator`."""
        self.add(self.reduce(h, weight).cpu(), rows)


def pool(h: Tensor, weight: Tensor) -> Tensor:
    """Mean over the span of each text: [batch, tokens, width], [batch, tokens] -> [batch, width] in fp32."""
    weight = weight.to(torch.float32)
    return torch.einsum("btd,bt->bd", h.to(torch.float32), weight / weight.sum(1, keepdim=True).clamp_min(1))
