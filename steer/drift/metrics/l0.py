"""How many features are on at a token."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import DictionaryMeasurement
from steer.drift.metric import drift_metric


@drift_metric("l0", unit="features", of=("dictionary",))
def l0(site: DictionaryMeasurement) -> Tensor:
    """Number of features of the dictionary that are on at a token, on average."""
    return site.now.l0.reshape(1)


@drift_metric("l0_change", unit="features", logged=False, of=("dictionary",))
def l0_change(site: DictionaryMeasurement) -> Tensor:
    """`l0` minus that of the baseline."""
    return (site.now.l0 - site.baseline.l0).reshape(1)
