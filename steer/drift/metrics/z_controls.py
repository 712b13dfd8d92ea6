"""Effect against the random directions of the same site."""

from __future__ import annotations

from torch import Tensor

from steer.drift.feature_measurement import FeatureMeasurement
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import standardise


@drift_metric("z_controls", needs=("effect_sd",), controls=False, of=("direction", "feature"))
def z_controls(site: SiteMeasurement | FeatureMeasurement) -> Tensor:
    """`effect_sd` / root mean square of that of the random directions at this site, or of the random features.

    The sign of a random direction is arbitrary, so the controls' spread is their root mean square about 0. With c controls the null
    is close to Student's t with c degrees of freedom: |z| > 2.1 for 5 % with 16.
    """
    effect = site.values["effect_sd"]
    return standardise(site.named(effect), site.controls(effect).square().mean().sqrt())
