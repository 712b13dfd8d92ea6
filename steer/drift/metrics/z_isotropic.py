"""Shift along the direction against random pairs of a direction and a shift."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import cosine_p


@drift_metric("z_isotropic", modes=("probe",), controls=False, logged=False)
def z_isotropic(site: SiteMeasurement) -> Tensor:
    """Cosine of the shift with the direction, against that of random pairs that vary as the baseline does: beyond 1.96 in 5 % of them.

    Where the baseline states are isotropic this is the cosine times the root of the width. Where they vary along few dimensions, chance
    alone gives larger cosines: there that product passes 1.96 in 40 to 80 % of pairs that have nothing to do with each other. The size of
    z is that of a normal variable which is as rare as the cosine, so it ends at 3.9, with 9,999 pairs drawn. Simulated, 1.96 is passed in
    3 to 8 % with 16 prompts or more and in 0.5 to 8 % with 6 to 15 (simulated, variances falling as 1/rank^0.5 to 1/rank^2); with fewer
    than three it is not defined.
    """
    length = site.shift.norm()
    cosines = site.directions.named_units @ site.shift / length  # [named directions]
    p = cosine_p(cosines, site.baseline_states, seed=site.seed)
    z = -torch.special.ndtri(p / 2) * cosines.sign()
    return torch.where(length == 0, 0.0, z)
