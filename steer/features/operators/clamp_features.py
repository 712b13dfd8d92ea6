"""Feature clamping (Templeton et al. 2024, Scaling Monosemanticity: "Golden Gate Claude"), with the dictionary's error kept."""

from __future__ import annotations

from torch import Tensor

from steer.errors import ConfigError
from steer.features.dictionary import Dictionary, Features
from steer.features.feature_edit import FeatureEdit
from steer.features.numbers import Numbers, per_feature, times_maxima
from steer.intervene.operator import OPERATORS, RowTensors, same_slots

MODES = ("to", "scale", "add", "low", "high")


@OPERATORS.register("clamp_features")
class ClampFeatures(FeatureEdit):
    """h + strength * sum_j (f'_j - f_j) W_j: sets, scales, bounds or shifts features, and keeps the dictionary's error (feature clamping).

    Exactly one of `to`, `scale`, `add` and a range is given. Features that are clamped together see the same activation; a second clamp at
    the site would read what the first one left.

    Args:
        dictionary: an autoencoder of the site that is edited.
        features: one index or several.
        to: f' = to, whether the feature is on or not.
        scale: f' = scale * f.
        add: f' = f + add.
        low, high: f' = f within these bounds; None for an open end.
        of_maximum: `to`, `add` and bounds count in multiples of the largest value that the feature was seen with.
        maxima: [chosen] these values, where the dictionary does not record them (`dictionary.maxima`) or others are meant.

    Numbers are one for all features, one for each, or [slots, chosen].

    Raises:
        ConfigError: no or several kinds of clamp, an empty range, features that are none or named twice, no recorded maximum.

    Example:
        >>> clamp = steer.ClampFeatures(dictionary, [3, 40], to=1.5, of_maximum=True)
        >>> plan = steer.Plan(steer.Intervention(clamp, dictionary.writes[0]))
    """

    def __init__(
        self,
        dictionary: Dictionary,
        features: Features,
        *,
        to: Numbers | None = None,
        scale: Numbers | None = None,
        add: Numbers | None = None,
        low: Numbers | None = None,
        high: Numbers | None = None,
        of_maximum: bool = False,
        maxima: Numbers | None = None,
    ) -> None:
        given = {mode: value for mode, value in zip(MODES, (to, scale, add, low, high), strict=True) if value is not None}
        if not given or len(given) > 1 and given.keys() != {"low", "high"}:
            raise _no_mode(list(given))
        numbers = {mode: per_feature(value, features, mode) for mode, value in given.items()}
        if of_maximum and "scale" in given:
            raise _scaled_maximum()
        if of_maximum:
            numbers = {mode: times_maxima(value, dictionary, features, maxima) for mode, value in numbers.items()}
        elif maxima is not None:
            raise _unused_maxima()
        same_slots(self.name, **numbers)
        if len(numbers) == 2 and not bool((numbers["low"] <= numbers["high"]).all()):
            raise _empty_range(numbers)
        super().__init__(dictionary, features, numbers, reads="add" not in given)

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        if f is None:
            return per_row["add"]
        if "to" in per_row:
            return per_row["to"].to(f.dtype) - f
        if "scale" in per_row:
            return (per_row["scale"] - 1).to(f.dtype) * f
        low, high = (per_row[name].to(f.dtype) if name in per_row else None for name in ("low", "high"))
        return f.clamp(low, high) - f

    def slope(self, f: Tensor, per_row: RowTensors) -> Tensor | float:
        if "to" in per_row:
            return -1.0
        if "scale" in per_row:
            return (per_row["scale"] - 1).to(f.dtype)
        low, high = (per_row[name].to(f.dtype) if name in per_row else None for name in ("low", "high"))
        return (f.clamp(low, high) == f).to(f.dtype) - 1

    def numbers(self) -> dict[str, Tensor]:
        return {mode: self.tensors[mode] for mode in MODES if mode in self.tensors}

    def describe(self) -> str:
        shown = [
            f"{name} {', '.join(f'{value:.4g}' for value in tensor.flatten()[:6].tolist())}{', ...' * (tensor.numel() > 6)}"
            for name, tensor in self.numbers().items()
        ]
        return f"clamp {self.listed()}: {'; '.join(shown)}"


# ---- errors


def _no_mode(given: list[str]) -> ConfigError:
    return ConfigError(
        "'clamp_features' does not know what becomes of the features",
        expected="one of to, scale, add, or a range of low, high or both",
        found=" and ".join(given) or "none of them",
        remedy="e.g. ClampFeatures(dictionary, 5, to=3.0)",
    )


def _scaled_maximum() -> ConfigError:
    return ConfigError(
        "`scale` of 'clamp_features' is a factor of each feature already",
        expected="of_maximum with to, add, low or high",
        found="of_maximum with scale",
        remedy="leave of_maximum out",
    )


def _unused_maxima() -> ConfigError:
    return ConfigError(
        "the maxima given to 'clamp_features' have no use",
        expected="of_maximum=True with them",
        found="maxima alone",
        remedy="pass of_maximum=True, or leave them out",
    )


def _empty_range(numbers: dict[str, Tensor]) -> ConfigError:
    found = " to ".join(str(numbers[name].flatten().tolist()[:6]) for name in ("low", "high"))
    return ConfigError("the range of 'clamp_features' is empty", expected="low <= high", found=found, remedy="exchange the two")
