"""How often a feature is on."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.metric import drift_metric


@drift_metric("density", unit="of tokens", of=("feature",))
def density(site: FeatureMeasurement) -> Tensor:
    """Share of tokens on which the feature is on; in probe mode the mean of the share in each text."""
    return site.now.density


@drift_metric("density_change", unit="of tokens", of=("feature",))
def density_change(site: FeatureMeasurement) -> Tensor:
    """`density` minus that of the baseline."""
    return site.changes[1]


@drift_metric("density_change_low", unit="of tokens", logged=False, of=("feature",))
def density_change_low(site: FeatureMeasurement) -> Tensor:
    """Lower end of the 95 % interval of `density_change`, as of `change_low`."""
    return site.interval[0, 1]


@drift_metric("density_change_high", unit="of tokens", logged=False, of=("feature",))
def density_change_high(site: FeatureMeasurement) -> Tensor:
    """Upper end of the same interval."""
    return site.interval[1, 1]
