"""Sparsifiers: what keeps a dictionary in training sparse, one file each in `steer.features.training.sparsifiers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steer.checks import finite_number
from steer.features.activation import Activation
from steer.registry import Registry


@dataclass(frozen=True)
class Step:
    """The training step at hand.

    Attributes:
        k: features per token that are wanted at this step.
        warmth: share of the sparsity penalty that holds already, from 0 to 1.
        tokens: of the batch, over all processes.
        gathered: puts together a tensor [n] of each process, whose n may differ.
    """

    k: float
    warmth: float
    tokens: int
    gathered: Callable[[Tensor], Tensor]


class Sparsifier(nn.Module):
    """Chooses the features that are on in training, and says what the dictionary computes afterwards.

    Behind `active`, `pre`, `values` and `features` are [n_active]: pre-activations and values at the places chosen, and their features.

    Attributes:
        name: under which it is registered.
        has_bias: the encoder has a bias of its own.
        k: features per token at the end of training.

    Example:
        >>> sparsifier = steer.features.training.SPARSIFIERS.get("topk")(width=64, k=4)
        >>> sparsifier.activation().name
        'topk'
    """

    name: ClassVar[str]
    has_bias: ClassVar[bool] = True
    starts_dense: ClassVar[bool] = False  # at first about half of all features are on

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.width, self.k = width, k

    def active(self, pre: Tensor, step: Step) -> Tensor:
        """[n_active] places in the flattened pre-activations [tokens, features] that are computed with gradient, growing."""
        raise NotImplementedError

    def values(self, pre: Tensor, features: Tensor) -> Tensor:
        """[n_active] features from their pre-activations, differentiable."""
        return pre

    def penalty(self, values: Tensor, pre: Tensor, features: Tensor, step: Step) -> Tensor | None:
        """[] what the loss has besides the error of the reconstruction, a sum over tokens; None for nothing."""
        return None

    def gate_values(self, pre: Tensor, features: Tensor) -> Tensor | None:
        """[n_active] a second set of features that has to reconstruct too, with the decoder as it is; None for none."""
        return None

    def observe(self, values: Tensor, l0: float, step: Step) -> None:
        """Takes note of what was on in a step of training.

        Args:
            values: [n_on] the features other than 0 in this process.
            l0: number of features that were on per token, over all processes.
        """

    def activation(self) -> Activation:
        """The activation of the finished dictionary."""
        raise NotImplementedError


class PenalisedSparsifier(Sparsifier):
    """A sparsifier whose features are kept few by a penalty, with a coefficient that is adjusted until k of them are on.

    Args:
        coefficient: factor of the penalty at the beginning; with `adjust=False` for good.
    """

    RATE = 0.02  # a step changes the coefficient by this share at most
    starts_dense = True
    coefficient: Tensor  # [] buffer

    def __init__(self, width: int, k: int, coefficient: float, adjust: bool) -> None:
        super().__init__(width, k)
        finite_number(coefficient, f"`coefficient` of the sparsifier '{self.name}'", above=0)
        self.adjust = adjust
        self.register_buffer("coefficient", torch.tensor(float(coefficient)))

    def observe(self, values: Tensor, l0: float, step: Step) -> None:
        if self.adjust and step.warmth >= 1:
            ratio = max(l0, 1e-3) / self.k
            self.coefficient *= min(max(ratio, 1 / (1 + self.RATE)), 1 + self.RATE) if abs(ratio - 1) > 0.02 else 1.0


SPARSIFIERS: Registry[type[Sparsifier]] = Registry(
    "sparsifier", "steer.features.training.sparsifiers", "steer.sparsifiers", subclass_of=Sparsifier
)
"""What keeps dictionaries in training sparse, one a file. See `steer.features.training.sparsifier`."""
