"""Sign-flip test of the change."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import sign_flip_p


@drift_metric("p", modes=("probe",), controls=False, of=("direction", "feature"))
def p(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """Two-sided sign-flip test of `change` = 0, paired by prompt; with n prompts never below 2 / 2^n."""
    return sign_flip_p(site.named(site.differences), seed=site.seed)
