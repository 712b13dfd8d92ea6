"""Features that are never on."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import DictionaryMeasurement
from steer.drift.metric import drift_metric


@drift_metric("silent", unit="of the features", of=("dictionary",))
def silent(site: DictionaryMeasurement) -> Tensor:
    """Share of the features that are on at none of the tokens that were read; few tokens leave many silent."""
    return site.now.silent.reshape(1)


@drift_metric("silent_change", unit="of the features", logged=False, of=("dictionary",))
def silent_change(site: DictionaryMeasurement) -> Tensor:
    """`silent` minus that of the baseline."""
    return (site.now.silent - site.baseline.silent).reshape(1)
