"""Average effects over facts: tokens by their role in the prompt, with 95 % intervals over facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

LEVEL = 0.95
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first later token",
    "later tokens",
    "last token",
)


def role_of(token: int, first: int, last: int, n_tokens: int) -> str:
    """The role of a token, empty before the subject.

    The last token of the prompt is that, whatever else it is. A subject of one token is its last token.

    Args:
        first, last: tokens of the subject.
    """
    if token < first:
        return ""
    if token == n_tokens - 1:
        return ROLES[5]
    if token == last:
        return ROLES[2]
    if token < last:
        return ROLES[0] if token == first else ROLES[1]
    return ROLES[3] if token == last + 1 else ROLES[4]


@dataclass(frozen=True)
class Mean:
    """A mean over n facts with Student's interval, whose ends are None for one fact.

    Attributes:
        value, low, high: the mean and the ends of its 95 % interval, in the unit of what was averaged.
        n: number of facts.

    Example:
        >>> mean = traced.average("total_effect")
        >>> mean.value, mean.low, mean.high
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        """`0.363 [0.151, 0.575]`."""
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_over_facts(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean, and half the width of its interval, NaN for one fact. values: one tensor for each fact, all of one shape."""
    of_facts = torch.stack(list(values))  # [facts, ...]
    n = len(of_facts)
    if n < 2:
        return of_facts[0], torch.full_like(of_facts[0], math.nan)
    return of_facts.mean(0), float(student.ppf((1 + LEVEL) / 2, n - 1)) * of_facts.std(0) / n**0.5


@dataclass(frozen=True, eq=False)
class AverageEffects:
    """Average indirect effects of one kind: tokens of a role are averaged within a fact, then facts.

    Attributes:
        kind: what was restored. measure: of the effect.
        roles: those that some fact has, in the order of a prompt.
        n: [roles] facts that have a token of it.
        mean: [roles, layers]. half: [roles, layers] half the width of the 95 % interval, NaN for one fact.

    Example:
        >>> effects = traced.average_effects("hidden")
        >>> effects.roles, effects.mean.shape, effects.peak(effects.roles[0])  # [roles, layers]
    """

    kind: str
    measure: str
    roles: tuple[str, ...]
    n: tuple[int, ...]
    mean: Tensor
    half: Tensor

    def at(self, role: str, layer: int) -> Mean:
        """The effect of one role in one layer."""
        place = self.roles.index(role)
        value, half = float(self.mean[place, layer]), float(self.half[place, layer])
        return Mean(value, None, None, self.n[place]) if math.isnan(half) else Mean(value, value - half, value + half, self.n[place])

    def peak(self, role: str) -> tuple[int, Mean]:
        """The layer with the highest mean of a role. Its interval is that of the layer alone, which was chosen among all of them."""
        layer = int(self.mean[self.roles.index(role)].argmax())
        return layer, self.at(role, layer)

    def __repr__(self) -> str:
        return f"AverageEffects({self.kind}, {self.measure}, {len(self.roles)} roles by {self.mean.shape[1]} layers)"
