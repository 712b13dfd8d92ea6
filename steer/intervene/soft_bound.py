"""Soft bounds: numbers that stay in a range, with a gradient that says where they would go."""

from __future__ import annotations

from torch import Tensor


def soft_bound(x: Tensor, low: Tensor, high: Tensor, softness: float) -> Tensor:
    """x where it lies in a range; beyond an end that end and a margin, which tanh approaches, so that slope and value have no step.

    Args:
        low, high: ends of the range, of what broadcasts to x. softness: the margin, in parts of the range; 0 is a hard clamp.
    """
    inside = x.clamp(low, high)
    if softness == 0:
        return inside
    margin = (high - low).clamp_min(1e-12) * softness
    return inside + margin * ((x - inside) / margin).tanh()
