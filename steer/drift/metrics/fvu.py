"""How much of the activations a dictionary does not explain."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import DictionaryMeasurement
from steer.drift.metric import drift_metric


@drift_metric("fvu", unit="of the variance", of=("dictionary",))
def fvu(site: DictionaryMeasurement) -> Tensor:
    """Share of the variance that the dictionary does not explain; nan for transcoders, which explain another site."""
    return site.now.fvu.reshape(1)


@drift_metric("fvu_change", unit="of the variance", of=("dictionary",))
def fvu_change(site: DictionaryMeasurement) -> Tensor:
    """`fvu` minus that of the baseline. Where it rises much, the features no longer mean what they were named for."""
    return (site.now.fvu - site.baseline.fvu).reshape(1)
