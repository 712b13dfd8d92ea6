"""Activation of a feature where it is on."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.metric import drift_metric


@drift_metric("mean_on", unit="of the activation", logged=False, of=("feature",))
def mean_on(site: FeatureMeasurement) -> Tensor:
    """Mean of the feature over the tokens on which it is on; nan where it never is."""
    return site.now.mean_on
