"""Shift along the direction against random directions that vary as the baseline does."""

from __future__ import annotations

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import standardise


@drift_metric("z_covariance", modes=("probe",), controls=False, logged=False)
def z_covariance(site: SiteMeasurement) -> Tensor:
    """Shift against random directions with the covariance of the baseline states; the strictest z, and blind with few prompts.

    The projection of such directions on the shift, at a mean square length of 1, has the variance shift' C shift / trace C with the
    baseline's covariance C. Few dominant directions carry most of C; it cannot see more dimensions than there are prompts.
    """
    centred = site.baseline_states - site.baseline_states.mean(0)  # [prompts, width]
    return standardise(site.directions.named_units @ site.shift, (centred @ site.shift).norm() / centred.norm())
