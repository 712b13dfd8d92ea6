"""Shift along the direction against all isotropic random directions."""

from __future__ import annotations

import math

from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import standardise


@drift_metric("z_isotropic", modes=("probe",), controls=False, logged=False)
def z_isotropic(site: SiteMeasurement) -> Tensor:
    """Shift against all random directions at once: its cosine with the direction, times the root of the width.

    It is the exact limit of infinitely many isotropic controls, whose projection on the shift has the variance |shift|^2 / width.
    """
    return standardise(site.directions.named_units @ site.shift, site.shift.norm() / math.sqrt(len(site.shift)))
