"""Optimisation: how long and how fast dictionaries are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from steer.checks import finite_number, number_within, whole_number


@dataclass(frozen=True)
class Optimisation:
    """What all dictionaries of a run have in common.

    Attributes:
        steps: optimiser steps. lr: learning rate of Adam.
        lr_warmup: steps over which it rises from 0. lr_decay: share of the steps, at the end, over which it falls to 0.
        sparsity_warmup: steps over which a penalty rises, or the number of features that are on falls from four times k to k.
        aux: weight of the loss by which dead features learn what the others leave over (Gao et al. 2024); 0 for none.
        dead_after: tokens without being on after which a feature is dead.
        seed: of the first weights and of the order of tokens.

    Example:
        >>> optimisation = steer.features.training.Optimisation(steps=1000, lr_warmup=100)
        >>> optimisation.rate(500)
        1.0
    """

    steps: int
    lr: float = 1e-3
    lr_warmup: int = 50
    lr_decay: float = 0.2
    sparsity_warmup: int = 50
    aux: float = 1 / 32
    dead_after: int = 150_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("lr_warmup", 0), ("sparsity_warmup", 0), ("dead_after", 1), ("seed", 0)):
            whole_number(getattr(self, name), f"`{name}` of a training", least=least)
        finite_number(self.lr, "`lr` of a training", above=0)
        number_within(self.lr_decay, "`lr_decay` of a training", 0, 1)
        number_within(self.aux, "`aux` of a training", 0)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        falling = self.steps * self.lr_decay
        end = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return min(1.0, (step + 1) / (self.lr_warmup + 1)) * max(end, 0.0)

    def warmth(self, step: int) -> float:
        """Share of the sparsity that holds at a step."""
        return min(1.0, step / self.sparsity_warmup) if self.sparsity_warmup else 1.0

    def described(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)
