"""Places of a circuit: the sites at which activations are split into features of a dictionary and what the dictionary leaves over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.checks import of_type
from steer.circuits.texts import NO_ROLE, Batch
from steer.errors import ConfigError, WidthError
from steer.features.dictionary import Dictionary
from steer.features.feature_edit import of_one_site
from steer.model.anatomy import Anatomy
from steer.model.site import Site

EMBEDDING = "embedding"


@dataclass(frozen=True, eq=False)
class Place:
    """A site at which an activation is the sum of parts.

    The activation y of the site written is `decode(f, x) + e`: features f of the dictionary, which reads x, and its error e. Without a
    dictionary y is one part alone, which stands where the error would.

    Attributes:
        name: of the dictionary, as the user calls it.
        dictionary: None for the embedding.
        reads, writes: the same site for an autoencoder.
    """

    name: str
    dictionary: Dictionary | None
    reads: Site
    writes: Site

    @property
    def width(self) -> int:
        """Number of features."""
        return 0 if self.dictionary is None else self.dictionary.width

    @property
    def rest(self) -> str:
        """Kind of the node that holds what is no feature."""
        return EMBEDDING if self.dictionary is None else "error"

    def roles(self, batch: Batch, x: Tensor) -> Tensor:
        """[rows, tokens] roles, NO_ROLE also at tokens that the dictionary was not trained on, which are left alone."""
        if self.dictionary is None:
            return batch.roles
        inside = self.dictionary.untrained.trained_on(x, batch.places)
        return batch.roles if inside is None else torch.where(inside, batch.roles, NO_ROLE)

    def encode(self, x: Tensor, batch: Batch) -> Tensor:
        """[rows, tokens, features] at least in fp32; differentiable."""
        if self.dictionary is None:
            return x.new_zeros((*x.shape[:-1], 0), dtype=torch.promote_types(x.dtype, torch.float32))
        return self.dictionary.encode(x, positions=batch.places)

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """[rows, tokens, width of the site] at least in fp32; differentiable."""
        if self.dictionary is None:
            return torch.zeros_like(x, dtype=f.dtype)
        return self.dictionary.decode(f, x)


def places_of(anatomy: Anatomy, dictionaries: Mapping[str, Dictionary], *, embedding: bool) -> list[Place]:
    """Places in the order in which a pass reaches them.

    Raises:
        ConfigError: no dictionaries, one that reads or writes several sites, or two that write one site. SiteError: a site that the model
            does not have. WidthError: a dictionary of another width than its site.
    """
    of_type(dictionaries, Mapping, "the dictionaries of a circuit", "pass {name: dictionary}, e.g. {'sae': sae}")
    if not dictionaries:
        raise _no_dictionaries()
    places = []
    for name, dictionary in dictionaries.items():
        of_type(name, str, "the name of a dictionary", "pass {name: dictionary}")
        of_type(dictionary, Dictionary, f"the dictionary '{name}'", "load one with steer.load_dictionary")
        of_one_site(dictionary, "feature_circuit")
        points = [anatomy.point(sites[0]) for sites in (dictionary.reads, dictionary.writes)]
        for point, width in zip(points, (dictionary.d_in, dictionary.d_out), strict=True):
            if point.width is not None and point.width != width:
                raise _other_width(name, point.site, width, point.width)
        places.append(Place(name, dictionary, points[0].site, points[1].site))
    if embedding:
        places.append(Place(EMBEDDING, None, anatomy.point("embed").site, anatomy.point("embed").site))
    _check_apart(places)
    return sorted(places, key=lambda place: place.writes.order)


def _check_apart(places: list[Place]) -> None:
    by_site: dict[Site, Place] = {}
    for place in places:
        if place.writes.module is not None or place.writes.stack is not None:
            raise _no_order(place)
        if place.writes in by_site:
            raise _one_site(by_site[place.writes], place)
        by_site[place.writes] = place


# ---- errors


def _no_dictionaries() -> ConfigError:
    return ConfigError("a feature circuit has no dictionaries", expected="at least one", found="none", remedy="pass {'sae': dictionary}")


def _other_width(name: str, site: Site, width: int, found: int) -> WidthError:
    return WidthError(
        f"the dictionary '{name}' does not fit this model",
        expected=f"activations of width {width} at '{site}'",
        found=found,
        remedy="use a dictionary that was trained on this model",
    )


def _no_order(place: Place) -> ConfigError:
    return ConfigError(
        f"the dictionary '{place.name}' has no place in the order of a pass",
        expected="a site of the stack that the tokens go through, e.g. layers.12.output",
        found=str(place.writes),
        remedy="load the dictionary with reads= and writes= that name such a site",
    )


def _one_site(first: Place, second: Place) -> ConfigError:
    return ConfigError(
        f"'{first.name}' and '{second.name}' split the same activation",
        expected="one dictionary for each site that is written",
        found=str(second.writes),
        remedy="attribute with one of them at a time",
    )
