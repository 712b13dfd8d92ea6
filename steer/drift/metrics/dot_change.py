"""Change of the product with a direction as long as it is."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("dot_change", unit="of h·v", needs=("change",), controls=False, logged=False)
def dot_change(site: SiteMeasurement) -> Tensor:
    """`change` times the length of the direction; of a lens's direction, how much its token's logit rose (before the final norm)."""
    change = site.named(site.values["change"])
    return change * change.new_tensor(site.directions.gaps)
