"""Interval of the change of a feature."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.metric import drift_metric


@drift_metric("change_low", unit="of the activation", logged=False, of=("feature",))
def change_low(site: FeatureMeasurement) -> Tensor:
    """Lower end of the 95 % interval of a feature's `change`: over texts, paired, in probe mode; over rows of batches in stream mode."""
    return site.interval[0, 0]


@drift_metric("change_high", unit="of the activation", logged=False, of=("feature",))
def change_high(site: FeatureMeasurement) -> Tensor:
    """Upper end of the same interval."""
    return site.interval[1, 0]
