"""Change in baseline standard deviations."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import standardise


@drift_metric("effect_sd", unit="baseline standard deviations", needs=("change",))
def effect_sd(site: SiteMeasurement) -> Tensor:
    """`change` / spread of the baseline over prompts or tokens. Any fine-tune makes it large at first: read it beside `z_controls`."""
    return standardise(site.values["change"], site.baseline_sd)
