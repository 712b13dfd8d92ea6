"""Largest activation of a feature."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.metric import drift_metric


@drift_metric("maximum", unit="of the activation", logged=False, of=("feature",))
def maximum(site: FeatureMeasurement) -> Tensor:
    """Largest activation of the feature; 0 where it is never on."""
    return site.now.maximum
