"""What one measurement says about one direction at one site, and what a store must know about that direction."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

MODES = ("probe", "stream")
KINDS = ("named", "control")


@dataclass(frozen=True)
class DriftRecord:
    """One direction at one site at one optimiser step.

    Projections are taken on the direction at length 1, so `mean`, `sd` and `change` carry the units of the activation. A value is nan where
    it is not defined (fewer than two observations, activations that are not finite), None where the mode or kind has no such value.

    Attributes:
        step: optimiser steps done before the measurement.
        mode: `probe` (fixed prompts, compared with their own first measurement) or `stream` (training tokens since the check before,
            compared with the first such window).
        direction, site: which vector, and where.
        kind: `named`, or `control` for a random direction of the same site.
        n: prompts (probe) or labelled tokens (stream).
        mean, sd: of the projection over prompts or tokens; `sd` with n - 1.
        change: mean minus the baseline's mean.
        effect_sd: change / the baseline's sd. Every fine-tune, a benign one too, makes this large at first: read it beside `z_controls`.
        effect_gap: change / gap between the two classes the direction was read from (its own length); None for controls.
        p: two-sided, paired sign-flip test of change = 0; probe mode, named directions.
        q: `p` after Benjamini-Hochberg over the named directions of this measurement.
        z_controls: effect_sd / root mean square of the controls' effect_sd at the same site; named directions.
        z_isotropic: change against all isotropic random directions, cos(shift, direction) * sqrt(width); probe mode, named directions.
        z_covariance: change against random directions with the covariance of the baseline states; probe mode, named directions.
    """

    step: int
    mode: str
    direction: str
    site: str
    kind: str
    n: int
    mean: float
    sd: float
    change: float
    effect_sd: float
    effect_gap: float | None = None
    p: float | None = None
    q: float | None = None
    z_controls: float | None = None
    z_isotropic: float | None = None
    z_covariance: float | None = None


@dataclass(frozen=True)
class Tracked:
    """A direction as the store knows it.

    Attributes:
        gap: class gap along a named direction, None for a control.
        sha256: of the unit vector in fp32, so that a series never mixes two vectors.
    """

    direction: str
    site: str
    kind: str
    gap: float | None
    sha256: str

    @classmethod
    def of(cls, direction: str, site: str, kind: str, gap: float | None, unit: Tensor) -> Tracked:
        """unit: [width]."""
        return cls(direction, site, kind, gap, hashlib.sha256(unit.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest())
