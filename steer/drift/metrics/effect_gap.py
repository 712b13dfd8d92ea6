"""Change in class gaps."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("effect_gap", unit="class gaps", needs=("change",), controls=False, logged=False)
def effect_gap(site: SiteMeasurement) -> Tensor:
    """`change` / gap between the two classes that the direction was read from (its own length)."""
    change = site.named(site.values["change"])
    return change / change.new_tensor(site.directions.gaps)
