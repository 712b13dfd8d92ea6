"""Dictionary features that are tracked together: the named ones and, always beside them, random features that are on as often."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steer.checks import of_type
from steer.drift.site_directions import TrackedDirection
from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.chosen_features import ChosenFeatures
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import chosen
from steer.features.random_features import random_features
from steer.model.site import Site


@dataclass(frozen=True, eq=False)
class TrackedFeatures:
    """Features of one dictionary for a tracker; a tuple of the same is taken too.

    Attributes:
        dictionary: one that reads one site, an autoencoder or a transcoder.
        features: one index or several, each named once.
        density: [width] share of tokens on which each feature is on, by which the random features are matched; what the dictionary recorded
            when None.

    Example:
        >>> tracked = steer.drift.TrackedFeatures(dictionary, [3, 40])
        >>> tracker = steer.DriftTracker(features={"praise": tracked}, probe=probe, controls=4)
    """

    dictionary: Dictionary
    features: Features
    density: Tensor | None = None


FeaturesLike = TrackedFeatures | tuple[Dictionary, Features] | tuple[Dictionary, Features, Tensor]


class FeatureGroup:
    """The features of one dictionary that are tracked under one name.

    Attributes:
        name: of the group.
        indices: [features] of the dictionary, the named ones first, then the controls.
        names: `<group>/<index>` of the named ones, `<group>/random-<index>` of the controls.
        encode: h [..., width] -> [..., features].
        measures_dictionary: the dictionary itself is measured under the name of this group.
    """

    def __init__(self, name: str, dictionary: SparseAutoencoder, named: Tensor, controls: Tensor, *, measures_dictionary: bool) -> None:
        self.name = name
        self.dictionary = dictionary
        self.named_count = len(named)
        self.indices = torch.cat([named, controls])
        self.names = (*(f"{name}/{i}" for i in named.tolist()), *(f"{name}/random-{i}" for i in controls.tolist()))
        with torch.inference_mode(False):
            self.encode = ChosenFeatures(dictionary, self.indices, f"the tracker of '{name}'").activations
        self.measures_dictionary = measures_dictionary

    def __repr__(self) -> str:
        return f"FeatureGroup({self.name}, {self.named_count} features at {self.site}, {len(self.names) - self.named_count} controls)"

    @property
    def site(self) -> Site:
        """The site that the dictionary reads."""
        return self.dictionary.reads[0]

    @property
    def width(self) -> int:
        """Of the activations."""
        return self.dictionary.d_in

    def kind(self, index: int) -> str:
        """`feature`, or `feature_control` for a random one."""
        return "feature" if index < self.named_count else "feature_control"

    def tracked(self) -> list[TrackedDirection]:
        """What the store is to know about each of them, and about the dictionary."""
        return self._described

    @cached_property
    def _described(self) -> list[TrackedDirection]:
        site = str(self.site)
        rows = self.dictionary.encoder_rows(self.indices).flatten(1)
        described = json.dumps([self.dictionary.name, self.dictionary.activation_name, self.dictionary.width])
        numbers = [(row, self._bias(i), self._threshold(i)) for i, row in zip(self.indices.tolist(), rows, strict=True)]
        of_features = [
            TrackedDirection(name, site, self.kind(i), None, _sha256(described, *numbers[i])) for i, name in enumerate(self.names)
        ]
        if not self.measures_dictionary:
            return of_features
        of_all = _sha256(described, self.dictionary.decoder_bias, *(part for of_one in numbers for part in of_one))
        return [*of_features, TrackedDirection(self.name, site, "dictionary", None, of_all)]

    def _bias(self, feature: int) -> Tensor:
        bias = self.dictionary.encoder.bias
        return torch.zeros(1) if bias is None else bias[feature].reshape(1)

    def _threshold(self, feature: int) -> Tensor:
        threshold = self.dictionary.threshold([feature])
        return torch.zeros(1) if threshold is None else threshold


def feature_groups(features: Mapping[str, FeaturesLike], controls: int, seed: int) -> list[FeatureGroup]:
    """Groups with their random features, at least as many as `controls` and as many for each named one.

    Raises:
        ConfigError: what is no dictionary of one site, features outside it, no density to match by, or no features that are like them.
    """
    of_type(features, Mapping, "the features of a tracker", "pass {name: (dictionary, [12, 400])}")
    groups: list[FeatureGroup] = []
    every = {name: asked if isinstance(asked, TrackedFeatures) else _unpacked(name, asked) for name, asked in features.items()}
    for name, asked in every.items():
        dictionary = of_one_read_site(f"'{name}'", asked.dictionary)
        named = chosen(asked.features, dictionary.width).cpu()
        draws = random_features(
            dictionary,
            named,
            draws=max(1, math.ceil(controls / max(1, len(named)))),
            seed=seed,
            density=asked.density,
            without=_named_together(dictionary, every),  # a feature that somebody looks at is no random one of another group
        )
        random = sorted({feature for draw in draws for feature in draw})
        is_first = all(group.dictionary is not dictionary for group in groups)
        groups.append(FeatureGroup(name, dictionary, named, torch.tensor(random), measures_dictionary=is_first))
    return groups


def _named_together(dictionary: Dictionary, every: Mapping[str, TrackedFeatures]) -> Tensor:
    """Features of a dictionary that any group names."""
    return torch.cat([chosen(asked.features, dictionary.width).cpu() for asked in every.values() if asked.dictionary is dictionary])


def of_one_read_site(what: str, dictionary: object) -> SparseAutoencoder:
    """The dictionary, when it reads one site. Raises ConfigError for others; what: that needs it, for the message."""
    if not isinstance(dictionary, SparseAutoencoder) or len(dictionary.reads) != 1:
        raise _not_of_one_site(what, dictionary)
    return dictionary


def _unpacked(name: str, given: object) -> TrackedFeatures:
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise _no_pair(name, given)
    return TrackedFeatures(*given)


def _sha256(text: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- errors


def _no_pair(name: str, given: object) -> ConfigError:
    return ConfigError(
        f"the features that are to be tracked as '{name}' are none",
        expected="(dictionary, [12, 400]), or steer.drift.TrackedFeatures(dictionary, [12, 400], density)",
        found=f"{type(given).__name__} {str(given)[:60]!r}",
        remedy="pass features={name: (dictionary, indices)}",
    )


def _not_of_one_site(what: str, dictionary: object) -> ConfigError:
    found = f"{type(dictionary).__name__} {str(dictionary)[:100]}"
    if isinstance(dictionary, Dictionary):
        found = f"a {dictionary.name} that reads {', '.join(map(str, dictionary.reads[:6]))}"
    return ConfigError(
        f"the features of {what} cannot be read",
        expected="a dictionary that reads one site: an autoencoder or a transcoder",
        found=found,
        remedy="load one with steer.load_dictionary; of other dictionaries, track decoder rows as directions",
    )
