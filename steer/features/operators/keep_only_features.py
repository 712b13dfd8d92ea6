"""The complement of feature ablation: of what a dictionary accounts for, chosen features alone stay. The operator is ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import TILE
from steer.features.feature_edit import FeatureEdit, check_dictionary, distinct
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("keep_only_features")
class KeepOnlyFeatures(FeatureEdit):
    """h - strength * sum_j f_j W_j over all features but the chosen: keeps these, the dictionary's error and its bias, and nothing else.

    It computes, holds and saves the whole dictionary.

    Args:
        dictionary: an autoencoder of the site that is edited.
        features: one index or several, that stay.

    Raises:
        ConfigError: features that are none or named twice; a dictionary of other sites.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.KeepOnlyFeatures(dictionary, [3, 40]), dictionary.writes[0]))
    """

    def __init__(self, dictionary: Dictionary, features: Features) -> None:
        check_dictionary(dictionary, self.name)
        dropped = torch.ones(1, 1, dictionary.width)
        dropped[..., distinct(features, dictionary.width)] = 0
        super().__init__(dictionary, features, {"dropped": dropped}, whole=True)

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        assert f is not None
        return -f * per_row["dropped"].to(f.dtype)

    def slope(self, f: Tensor, per_row: RowTensors) -> Tensor:
        return -per_row["dropped"].to(f.dtype)

    def moved(self, h: Tensor, x: Tensor, factor: Tensor, per_row: RowTensors) -> Tensor:
        """A few tokens at a time, since every token has all features; they are computed again for the gradient."""
        size = max(1, TILE // per_row["decoder"].shape[1])
        if h.shape[0] * h.shape[1] <= size:
            return super().moved(h, x, factor, per_row)
        one_row = [tensor.expand(*h.shape[:-1], -1).reshape(1, -1, tensor.shape[-1]).split(size, 1) for tensor in (h, x, factor)]

        def of_tile(h: Tensor, x: Tensor, factor: Tensor) -> Tensor:
            return super(KeepOnlyFeatures, self).moved(h, x, factor, per_row)

        return torch.cat([checkpoint(of_tile, *tile, use_reentrant=False) for tile in zip(*one_row, strict=True)], 1).view(h.shape)

    def describe(self) -> str:
        return f"keep only {self.listed()}"
