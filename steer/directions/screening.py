"""Steerability screen: how many texts a direction moves, and how many it moves the wrong way (Tan et al. 2024, arXiv 2407.12404).

A mean effect hides that many single texts answer to a direction with its opposite. For each pair the preference for the positive answer
is fitted by a line over doses from -d to d; its slope is the pair's steerability, and a pair with a negative slope is anti-steerable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from steer.checks import finite_number
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, check_direction
from steer.directions.sweep import pair_gaps


@dataclass(frozen=True)
class Screen:
    """Steerability of single pairs.

    Attributes:
        doses: the relative doses measured.
        slopes: one per pair, nat per token and unit of relative dose.
        steerability: their mean, in the same unit.
        anti_fraction, anti_interval: share of pairs with a negative slope, and its 95 % interval (Wilson 1927).
        site, method: of the direction.

    Example:
        >>> screened = steer.screen(model, direction, held_out, dose=0.3)
        >>> len(screened.slopes), screened.anti_interval
    """

    site: str
    method: str
    doses: tuple[float, ...]
    slopes: tuple[float, ...]
    steerability: float
    anti_fraction: float
    anti_interval: tuple[float, float]

    def __repr__(self) -> str:
        low, high = self.anti_interval
        share = f"{self.anti_fraction:.0%} the other way ({low:.0%} to {high:.0%})"
        return f"Screen({self.method} at {self.site}, {len(self.slopes)} pairs, steerability {self.steerability:.3g} nat/token, {share})"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "doses": list(self.doses), "slopes": list(self.slopes), "anti_interval": list(self.anti_interval)}


def screen(
    model: nn.Module, direction: Direction, contrast: ContrastSet, *, dose: float = 0.5, scope: str = "response", progress: bool = True
) -> Screen:
    """Measures how each pair answers to a direction; all doses of a text run in one batch.

    Args:
        model: a causal language model, raw or wrapped.
        direction: with its metrics, as `extract` gives it.
        contrast: pairs of answers that had no part in the direction.
        dose: the largest relative dose, in both signs; take the one that was calibrated.
        scope: on which tokens the direction is added.

    Raises:
        ContrastError: no pairs, or texts that the direction was made from.
        ConfigError: a dose that is not above 0; a scope of decoded tokens.

    Example:
        >>> screened = steer.screen(model, direction, held_out, dose=0.3)
        >>> screened.steerability, screened.anti_fraction  # nat per token and unit of dose; share of pairs that answer the wrong way
    """
    check_direction(direction)
    finite_number(dose, "the dose of a screen", above=0)
    doses = (-dose, -dose / 2, 0.0, dose / 2, dose)
    vectors = torch.tensor([direction.strength_of(relative) for relative in doses])[:, None] * direction.vector
    gaps = pair_gaps(model, direction, contrast, vectors, "screening" if progress else None, scope=scope)
    x = torch.tensor(doses, dtype=torch.float64)  # of mean 0
    slopes = (x @ gaps) / (x @ x)
    anti, n = int((slopes < 0).sum()), len(slopes)
    return Screen(
        site=str(direction.site),
        method=direction.method,
        doses=doses,
        slopes=tuple(slopes.tolist()),
        steerability=float(slopes.mean()),
        anti_fraction=anti / n,
        anti_interval=wilson(anti, n),
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927)."""
    centre, spread = (hits + z * z / 2) / (n + z * z), z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return max(centre - spread, 0.0), min(centre + spread, 1.0)
