"""Correction of p for the number of directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.drift.measurement import Measurement
from steer.drift.metric import drift_metric
from steer.drift.statistics import benjamini_hochberg


@drift_metric("q", needs=("p",), controls=False, across_sites=True, logged=False, of=("direction", "feature"))
def q(sites: Sequence[Measurement]) -> Tensor:
    """`p` after Benjamini-Hochberg over the named directions of all sites of this measurement, or over its features."""
    return benjamini_hochberg(torch.cat([site.values["p"] for site in sites]))
