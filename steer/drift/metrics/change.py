"""Change of the mean projection."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("change", unit="of the activation", of=("direction", "feature"))
def change(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """Mean projection on the direction at length 1, or mean of the feature, now minus that of the baseline."""
    if isinstance(site, FeatureMeasurement):
        return site.changes[0]
    if site.mode == "probe":
        return site.differences.mean(0)  # the mean of differences keeps digits that the difference of means cancels
    return site.mean - site.baseline_mean
