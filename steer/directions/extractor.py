"""Extractors: from contrast moments to a unit direction. A new one is a file with one registered function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.directions.moments import ContrastMoments
from steer.registry import Registry


@dataclass(frozen=True)
class Extractor:
    """A method.

    Attributes:
        direction: gives a [width] vector of any length and sign.
        second: it needs second moments.
    """

    direction: Callable[[ContrastMoments], Tensor]
    second: bool

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.direction.__doc__


EXTRACTORS: Registry[Any] = Registry("extractor")


def extractor(name: str, *, second: bool = False) -> Callable[[Callable[[ContrastMoments], Tensor]], Extractor]:
    """Registers a function as the extractor of that name."""

    def add(function: Callable[[ContrastMoments], Tensor]) -> Extractor:
        return EXTRACTORS.register(name)(Extractor(function, second))

    return add
