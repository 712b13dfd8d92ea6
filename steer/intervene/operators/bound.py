"""Activation-boundary defence (Gao et al. 2024, arXiv 2412.17034): activations softly kept in the range that harmless text has."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.checks import number_within
from steer.errors import ConfigError
from steer.intervene.low_rank import widened, without_autocast
from steer.intervene.operator import OPERATORS, Operator, RowTensors, same_slots, slotted


@OPERATORS.register("bound")
class Bound(Operator):
    """h + strength * (bound(h) - h): keeps every dimension softly in a range of its own, such as that of harmless text.

    Nothing changes inside the range. Beyond an end, the value approaches that end plus a margin as tanh does, so that the gradient is that
    of the edit and has no step. `steer.fit_boundary` fits the ranges; for a range along one direction, see `Clamp`.

    Args:
        low, high: ends of the range of each dimension, [width] or [slots, width].
        softness: the margin, in parts of the range; 0 is a hard clamp.

    Raises:
        ConfigError: an empty range, a negative softness.

    Example:
        >>> low, high = torch.full_like(vector, -2.0), torch.full_like(vector, 2.0)
        >>> plan = steer.Plan(steer.Intervention(steer.Bound(low, high), "layers.12.output"))
    """

    parts = ("low", "high")
    settings = ("softness",)
    linear_in_strength = True
    learnable = ("low", "high")

    def __init__(self, low: Tensor, high: Tensor, softness: float = 0.1) -> None:
        number_within(softness, "the softness of 'bound'", 0)
        low, high = (slotted(end, 2, f"{name} of 'bound'") for name, end in (("low", low), ("high", high)))
        same_slots(self.name, low=low, high=high)
        if low.shape[-1] != high.shape[-1] or not bool((low <= high).all()):
            raise _empty_range(low, high)
        self.softness = float(softness)
        super().__init__({"low": low, "high": high}, low.shape[-1])

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        with without_autocast(h):
            wide = widened(h)
            change = strength * self._pulled(wide, per_row)
            edited = wide + (change if mask is None else change * mask)
        return edited.to(h.dtype)

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        with without_autocast(h):
            return (strength * self._pulled(widened(h), per_row)).to(h.dtype)

    def _pulled(self, h: Tensor, per_row: RowTensors) -> Tensor:
        """How far each number is moved towards its range, [batch, tokens, width]; 0 inside."""
        low, high = per_row["low"].unsqueeze(1), per_row["high"].unsqueeze(1)  # [batch or 1, 1, width]
        beyond = h - torch.minimum(torch.maximum(h, low), high)
        if not self.softness:
            return -beyond
        margin = (high - low).clamp_min(1e-6) * self.softness
        return margin * torch.tanh(beyond / margin) - beyond

    def describe(self) -> str:
        return (
            f"keep every dimension in its range, softly by {self.softness:g} of it"
            if self.softness
            else "keep every dimension in its range"
        )


def _empty_range(low: Tensor, high: Tensor) -> ConfigError:
    widths = f"low {list(low.shape)}, high {list(high.shape)}"
    return ConfigError(
        "the range of 'bound' is empty",
        expected="low <= high in every dimension, both [width]",
        found=widths if low.shape[-1] != high.shape[-1] else f"low above high in {int((low > high).sum())} of {low.shape[-1]} dimensions",
        remedy="exchange the two, or fit them with steer.fit_boundary",
    )
