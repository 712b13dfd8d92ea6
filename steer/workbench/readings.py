"""Readings: one number for each token of an answer, taken from the running model at one site after the plan's edits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, one_of, whole_number
from steer.directions import Direction, Directions
from steer.directions.text import Names
from steer.errors import ConfigError, WidthError
from steer.features.dictionary import Dictionary
from steer.model import hooks
from steer.model.anatomy import resolve
from steer.model.context import ForwardContext
from steer.model.hook_registration import AFTER_EDITS
from steer.model.restoring import restoring
from steer.model.site import Site


class Reading(Protocol):
    """What tokens are coloured by.

    Attributes:
        site: where it reads.
        width: of the activations that it takes.
        unit: what 1 means. zero: what 0 means. is_signed: values may be negative.
    """

    site: Site
    width: int
    unit: str
    zero: str
    is_signed: bool

    def values(self, h: Tensor, start: int) -> Tensor:
        """[tokens] values of activations [tokens, width], of which the first is token `start` of the text."""
        ...


class Projection:
    """Projection on a unit direction: in class gaps, counted from half-way between the classes, where the direction knows both; else in the
    unit of the activation itself.

    Example:
        >>> Projection(directions["layers.12.output"]).unit
        'class gaps'
    """

    is_signed = True

    def __init__(self, direction: Direction) -> None:
        gap = direction.metrics.get("gap", 0.0)
        self.site, self.width = direction.site, len(direction.vector)
        self._unit = direction.unit.double()
        if gap > 0 and "mean" in direction.metrics:
            self._offset, self._scale = direction.metrics["mean"], gap
            self.unit, self.zero = "class gaps", "half-way between the texts with the concept and those without it"
        else:
            self._offset, self._scale = 0.0, 1.0
            self.unit, self.zero = "h \N{DOT OPERATOR} v / |v|, in the unit of the activation", "nothing along the direction"

    def values(self, h: Tensor, start: int) -> Tensor:
        return (h.double().cpu() @ self._unit - self._offset) / self._scale


class FeatureValue:
    """The activation of one feature of a dictionary; 0 at tokens that the dictionary was not trained on.

    Raises:
        ConfigError: a dictionary of several sites, or no such feature.
    """

    is_signed = False
    unit = "activation of the feature"
    zero = "the feature is off"

    def __init__(self, name: str, dictionary: Dictionary, feature: int) -> None:
        if len(dictionary.reads) != 1:
            raise _several_sites(name, dictionary)
        whole_number(feature, f"the feature of '{name}'")
        number_within(feature, f"the feature of '{name}'", 0, dictionary.width - 1)
        (self.site,) = dictionary.reads
        self.width = dictionary.d_in
        self._dictionary, self._feature = dictionary, feature

    def values(self, h: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + len(h), device=h.device)
        return self._dictionary.encode_selected(h, [self._feature], positions=positions)[:, 0].cpu()


class TokenReader:
    """The hook that reads the tokens of one text, pass by pass."""

    order = AFTER_EDITS

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._fresh: list[float | None] = []
        self._count = 0

    def __call__(self, h: Tensor, context: ForwardContext) -> None:
        """h: [1, tokens, width]."""
        if h.shape[-1] != self._reading.width:
            raise _other_width(self._reading, h)
        values = self._reading.values(h.detach()[0], self._count).tolist()
        self._count += len(values)
        self._fresh += [value if math.isfinite(value) else None for value in values]

    def take(self) -> list[float | None]:
        """Values of the tokens that were read since the last call; None for NaN and infinity."""
        fresh, self._fresh = self._fresh, []
        return fresh


@contextmanager
def tokens_read(model: nn.Module, reading: Reading | None) -> Iterator[TokenReader | None]:
    """Reads the passes of a model while the block runs. Raises SiteError where it has no such site."""
    if reading is None:
        yield None
        return
    reader = TokenReader(reading)
    anatomy, (point,) = resolve(model, [reading.site])
    installation = hooks.Installation(model, anatomy, [(point, reader)])
    with restoring(installation.remove):
        installation.install()
        yield reader


def offered(names: Names) -> list[dict[str, Any]]:
    """What tokens can be coloured by: every direction at every site where it was read, and every dictionary of one site. JSON-able."""
    choices: list[dict[str, Any]] = []
    for name, named in names.items():
        if isinstance(named, Directions):
            choices += [{"kind": "projection", "name": name, "site": str(site)} for site in named]
        elif isinstance(named, Direction):
            choices.append({"kind": "projection", "name": name, "site": str(named.site)})
        elif isinstance(named, Dictionary) and len(named.reads) == 1:
            choices.append({"kind": "feature", "name": name, "site": str(named.reads[0]), "width": named.width})
    return choices


def reading_of(choice: Mapping[str, Any] | None, names: Names) -> Reading | None:
    """The reading that the page asks for: one that is `offered`, for a dictionary with its `feature`. Raises ConfigError, SiteError."""
    if choice is None:
        return None
    of_type(choice, Mapping, "what tokens are coloured by", "send one of the readings that the page was given, or null")
    name = one_of(choice.get("name"), list(names), "the name of a reading")
    named = names[name]
    if isinstance(named, Dictionary):
        return FeatureValue(name, named, choice.get("feature", 0))
    if isinstance(named, Directions):
        of_type(choice.get("site"), str, "the site of a reading", "send one where the direction was read")
        named = named[choice["site"]]
    if not isinstance(named, Direction):
        raise _not_readable(name, named)
    return Projection(named)


# ---- errors


def _several_sites(name: str, dictionary: Dictionary) -> ConfigError:
    return ConfigError(
        f"tokens cannot be coloured by features of '{name}'",
        expected="a dictionary that reads one site",
        found=f"one that reads {', '.join(map(str, dictionary.reads))}",
        remedy="colour by a direction, or by a dictionary of one site",
    )


def _other_width(reading: Reading, h: Tensor) -> WidthError:
    return WidthError(
        f"what tokens are coloured by does not fit '{reading.site}'",
        expected=f"width {reading.width}",
        found=f"width {h.shape[-1]}",
        remedy="colour by a direction or a dictionary that was made on this model",
    )


def _not_readable(name: str, named: object) -> ConfigError:
    expected, remedy = "a direction or a dictionary", "colour by another name"
    return ConfigError(f"tokens cannot be coloured by '{name}'", expected=expected, found=type(named).__name__, remedy=remedy)
