"""Mean projection."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("mean", unit="of the activation", logged=False, of=("direction", "feature"))
def mean(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """Mean of the projection on the direction at length 1, or of the feature, over prompts or tokens."""
    return site.mean
