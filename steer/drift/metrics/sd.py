"""Spread of the projection."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric


@drift_metric("sd", unit="of the activation", logged=False, of=("direction", "feature"))
def sd(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """Standard deviation of the projection or the feature over prompts or tokens, with n - 1."""
    return site.sd
