"""Learned feature steering: gains and offsets of chosen features (constant ones, after Ferrao et al. 2025, FSRL, arXiv 2509.12934)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.features.dictionary import Dictionary, Features
from steer.features.feature_edit import FeatureEdit
from steer.features.numbers import Numbers, per_feature
from steer.intervene.operator import OPERATORS, RowTensors, same_slots


class Gain(NamedTuple):
    """What was learned of one feature in one row slot: it becomes gain * f + offset."""

    feature: int
    gain: float
    offset: float


@OPERATORS.register("feature_gains")
class FeatureGains(FeatureEdit):
    """h + strength * sum_j (gain_j f_j + offset_j - f_j) W_j: learns how much there is to be of each feature, and starts from h as it is.

    Args:
        dictionary: an autoencoder of the site that is edited, or a transcoder that writes it.
        features: one index or several.
        gain, offset: where it starts; one number for all features, one for each, or [slots, chosen].

    Raises:
        ConfigError: features that are none or named twice; a dictionary of several sites.

    Example:
        >>> gains = steer.FeatureGains(dictionary, [5, 7, 40]).train()
        >>> learned = steer.Plan(steer.Intervention(gains, dictionary.writes[0]))  # for a callback, or its parameters() for an optimiser
        >>> learned.interventions[0].operator.table()
    """

    learnable = ("gain", "offset")

    def __init__(self, dictionary: Dictionary, features: Features, gain: Numbers = 1.0, offset: Numbers = 0.0) -> None:
        numbers = {"gain": per_feature(gain, features, "gain"), "offset": per_feature(offset, features, "offset")}
        same_slots(self.name, **numbers)
        super().__init__(dictionary, features, numbers)

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        assert f is not None
        return (per_row["gain"] - 1).to(f.dtype) * f + per_row["offset"].to(f.dtype)

    def slope(self, f: Tensor, per_row: RowTensors) -> Tensor:
        return (per_row["gain"] - 1).to(f.dtype)

    def changes(self, h: Tensor) -> Tensor:
        """[..., 2 * chosen] how far gains are from 1 and offsets from 0, the same for every token of h [..., width]; of the first slot."""
        gain, offset = (self.tensors[name][0, 0].to(h.device, h.dtype) for name in ("gain", "offset"))
        return torch.cat([gain - 1, offset]).expand(*h.shape[:-1], -1)

    def table(self, slot: int = 0) -> list[Gain]:
        """Feature by feature what was learned, those that changed most first."""
        gains, offsets = (self.tensors[name].detach()[min(slot, len(self.tensors[name]) - 1), 0].tolist() for name in ("gain", "offset"))
        rows = [Gain(*row) for row in zip(self.features, gains, offsets, strict=True)]
        return sorted(rows, key=lambda row: -abs(row.gain - 1) - abs(row.offset))

    def numbers(self) -> dict[str, Tensor]:
        return {name: self.tensors[name].detach() for name in self.learnable}

    def describe(self) -> str:
        return f"gains and offsets of {self.listed()}"
