"""Change of the mean projection."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("change", unit="of the activation")
def change(site: SiteMeasurement) -> Tensor:
    """Mean projection now minus that of the baseline, on the direction at length 1."""
    if site.mode == "probe":
        return site.differences.mean(0)  # the mean of differences keeps digits that the difference of means cancels
    return site.mean - site.baseline_mean
