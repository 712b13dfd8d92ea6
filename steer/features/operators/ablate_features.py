"""Feature ablation: features of a dictionary are set to 0 (Marks et al. 2024, arXiv 2403.19647; CAFT, arXiv 2507.16795)."""

from __future__ import annotations

from torch import Tensor

from steer.features.dictionary import Dictionary, Features
from steer.features.feature_edit import FeatureEdit
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("ablate_features")
class AblateFeatures(FeatureEdit):
    """h - strength * sum_j f_j W_j: takes features of a dictionary out where they are on, and keeps its error; other tokens keep every bit.

    Args:
        dictionary: an autoencoder of the site that is edited.
        features: one index or several.

    Raises:
        ConfigError: features that are none or named twice; a dictionary of other sites.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.AblateFeatures(dictionary, [3, 40]), dictionary.writes[0]))
    """

    def __init__(self, dictionary: Dictionary, features: Features) -> None:
        super().__init__(dictionary, features, {})

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        assert f is not None
        return -f

    def slope(self, f: Tensor, per_row: RowTensors) -> float:
        return -1.0

    def describe(self) -> str:
        return f"ablate {self.listed()}"
