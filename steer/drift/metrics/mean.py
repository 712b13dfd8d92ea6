"""Mean projection."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("mean", unit="of the activation", logged=False)
def mean(site: SiteMeasurement) -> Tensor:
    """Mean of the projection on the direction at length 1, over prompts or tokens."""
    return site.mean
