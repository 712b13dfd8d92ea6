"""Attribution methods: at which points between two runs gradients are taken.

A new one is a file in `steer.circuits.attribution_methods`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from steer.circuits.component_pass import Edit, Record
from steer.model.site import Site
from steer.registry import Registry

Values = Mapping[Site, Tensor]  # [rows, tokens, width] by site
PLACES = {"left": 0.0, "midpoint": 0.5, "right": 1.0}  # of a point in its step


def shares_of_way(steps: int, points: str) -> list[float]:
    """Of a way from 0 to 1 in equal steps, a point in each: its `left` end, `midpoint` or `right` end."""
    return [(step + PLACES[points]) / steps for step in range(steps)]


def edit_at(where: Site, value: Tensor) -> Edit:
    """A constant in place of the activation at one site."""
    return lambda site, h: value if site == where else None


@dataclass(frozen=True, eq=False)
class GradientPass:
    """One pass with gradients.

    Attributes:
        weight: of its scores in the sum; 0 for a pass that is only looked at.
        edit: what takes the place of activations; None for the run as it is.
        only: the site whose writers are scored by it; None for all.
        start: what a writer's change starts from, filled while the pass runs; None for what it writes in the clean run.
        into: a record that gets what the pass finds, before the next pass is asked for.
    """

    weight: float = 1.0
    edit: Edit | None = None
    only: Site | None = None
    start: Values | None = None
    into: Record | None = None


class AttributionMethod(ABC):
    """A score of a component is (what it writes in the clean run - in the corrupted run) times a gradient, summed over tokens.

    Attributes:
        starts_clean: the first pass is the clean run itself, so that none has to be made before.
        needs_pairs: it goes to the counterfactual prompt, so that constants cannot stand in for that.
    """

    name: ClassVar[str]
    starts_clean: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False

    @abstractmethod
    def passes(self, clean: Values, corrupted: Values) -> Iterator[GradientPass]:
        """The passes of one batch. clean: empty where `starts_clean`."""

    def facts(self) -> dict[str, Any]:
        """What it was set to, JSON-able."""
        return dict(vars(self))


ATTRIBUTION_METHODS: Registry[type[AttributionMethod]] = Registry(
    "attribution method", "steer.circuits.attribution_methods", "steer.attribution_methods", subclass_of=AttributionMethod
)
