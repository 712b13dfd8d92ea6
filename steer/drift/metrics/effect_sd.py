"""Change in baseline standard deviations."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import standardise


@drift_metric("effect_sd", unit="baseline standard deviations", needs=("change",), of=("direction", "feature"))
def effect_sd(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """`change` / spread of the baseline over prompts or tokens. Any fine-tune makes it large at first: read it beside `z_controls`.

    A feature may have been silent at the baseline; its spread is the root mean square of those of the baseline and of now.
    """
    return standardise(site.values["change"], site.spread)
