"""SAE-refined directions: of what separates the classes, only the part that a few features of a sparse autoencoder account for.

After steering target atoms (Wang et al. 2025, arXiv 2505.20322, section 3.2). The features are found by what they do on the texts, not
by encoding the direction itself, which lies far from any activation that the encoder has seen (Mayne et al. 2024, arXiv 2411.08790).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction
from steer.directions.extract import scaled
from steer.directions.heldout import heldout_metrics
from steer.directions.moments import ContrastMoments
from steer.errors import ContrastError, SiteError, WidthError
from steer.features.dictionary import Dictionary
from steer.model.capture import capture


class FeatureMoments(ContrastMoments):
    """Accumulator: by class, the sum over texts of each feature's mean activation, and the number of texts in which it is ever on."""

    def __init__(self, dictionary: Dictionary, is_positive: Tensor, paired: bool) -> None:
        super().__init__(is_positive, paired)
        self.dictionary = dictionary
        self.amplitude = torch.zeros(2, dictionary.width, dtype=torch.float64)
        self.fired = torch.zeros_like(self.amplitude)

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, features + width + 2]: the mean activation of each feature over the span, and what `ContrastMoments` reads."""
        means = [self.dictionary.encode(text).mul(tokens[:, None]).sum(0) / tokens.sum() for text, tokens in zip(h, weight, strict=True)]
        return torch.cat([torch.stack(means), super().reduce(h, weight)], 1)

    def add(self, values: Tensor, rows: Tensor) -> None:
        features = self.amplitude.shape[1]
        super().add(values[:, features:], rows)
        means = values[:, :features].double()
        side = self.is_positive[rows].long()
        self.amplitude.index_add_(0, side, means)
        self.fired.index_add_(0, side, (means > 0).double())

    def gaps(self) -> tuple[Tensor, Tensor]:
        """[features] difference of the classes' mean activation, and of the shares of texts in which a feature is on."""
        texts = torch.stack([~self.is_positive, self.is_positive]).sum(1, keepdim=True)
        amplitude, fired = self.amplitude / texts, self.fired / texts
        return amplitude[1] - amplitude[0], fired[1] - fired[0]


@dataclass(frozen=True, eq=False)
class Refined:
    """A refined direction and what it is made of.

    Attributes:
        features: [k] indices, the one that accounts for most first.
        shares: [k] what each accounts for of the original direction's length.
    """

    direction: Direction
    features: Tensor
    shares: Tensor

    def __repr__(self) -> str:
        return f"Refined({self.direction}, {len(self.features)} features)"


def sae_refined(
    model: nn.Module,
    contrast: ContrastSet,
    direction: Direction,
    dictionary: Dictionary,
    *,
    top: int = 16,
    holdout: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> Refined:
    """Rebuilds a direction from the features of a dictionary that account for most of it.

    A feature is kept when it is active in more texts of one class and more strongly there, and its decoder row, times that difference,
    points along the direction; the `top` with the largest such part are added up and given the length of the class gap along their sum.

    Args:
        contrast, holdout, seed: as the direction was extracted with, so that the same texts stay held out.
        direction: read at the site of the dictionary.
        dictionary: an autoencoder of that site.
        top: number of features to keep.

    Raises:
        SiteError: the dictionary belongs to another site. WidthError: it has another width. ConfigError: `top` below 1, no dictionary.
        ContrastError: other texts than those of the extraction are held out, or no feature accounts for the direction.

    Example:
        >>> refined = steer.sae_refined(model, contrast, direction, dictionary, top=4)
    """
    of_type(dictionary, Dictionary, "the dictionary of a refined direction", "load one with steer.load_dictionary")
    if dictionary.reads != (direction.site,) or dictionary.writes != (direction.site,):
        raise _site_error(dictionary, direction)
    if dictionary.d_out != len(direction.vector):
        raise _width_error(dictionary, direction)
    whole_number(top, "`top`, the number of features that are kept", least=1)
    train, held_out = contrast.split(holdout, seed)
    direction.check_unseen((*held_out.positive, *held_out.negative), "the held-out texts")
    rows, sides = train.rows()
    moments = FeatureMoments(dictionary, torch.tensor(sides), train.paired)
    group = 2 if train.paired else 1
    capture(model, rows, {direction.site: moments}, span=direction.span, group=group, progress="reading features" if progress else None)
    amplitude, fired = moments.gaps()
    written = dictionary.decoder_rows(list(range(dictionary.width))).double().cpu()  # [features, width]
    part = amplitude * (written @ direction.unit.double())
    part = torch.where(amplitude * fired > 0, part, 0.0).clamp_min(0)
    features = part.topk(min(top, len(part))).indices
    features = features[part[features] > 0]
    if not len(features):
        raise _features_error(direction, len(part))
    vector = scaled(amplitude[features] @ written[features], moments, direction.site).float()
    metrics = heldout_metrics(model, held_out, {direction.site: vector[None]}, direction.span, progress)[direction.site][0]
    known = {**moments.along(vector), "n_train": float(len(train))}
    fitted_on = train.digests() | direction.fitted_on
    refined = Direction(direction.site, vector, "sae_refined", direction.span, {**metrics, **known}, fitted_on)
    return Refined(refined, features, part[features] / direction.vector.norm().double())


def _width_error(dictionary: Dictionary, direction: Direction) -> WidthError:
    return WidthError(
        f"the dictionary does not fit '{direction.site}'",
        expected=f"width {len(direction.vector)}",
        found=f"a dictionary of width {dictionary.d_out}",
        remedy="use the dictionary that was trained at this site of this model",
    )


def _site_error(dictionary: Dictionary, direction: Direction) -> SiteError:
    return SiteError(
        "the dictionary and the direction are of different sites",
        expected=f"an autoencoder of '{direction.site}'",
        found=f"{', '.join(map(str, dictionary.reads))} -> {', '.join(map(str, dictionary.writes))}",
        remedy="extract the direction at the dictionary's site",
    )


def _features_error(direction: Direction, features: int) -> ContrastError:
    return ContrastError(
        f"no feature accounts for the direction at '{direction.site}'",
        expected="features that are more active in one class and write along the direction",
        found=f"none of {features}",
        remedy="check that the dictionary was trained at this site of this model",
    )
