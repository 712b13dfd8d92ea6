"""Extractors: from contrast moments to a direction. A new one is a file with one registered function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.directions.moments import ContrastMoments
from steer.errors import ConfigError, ContrastError
from steer.registry import Registry


@dataclass(frozen=True)
class Extractor:
    """A method.

    Attributes:
        direction: gives a [width] vector of any length and sign.
        needs: what it reads beyond the class means, keys of `moments.NEEDS`.
        pairs: it is only defined on pairs.
        package: a module of the extra `directions` that it imports.
    """

    direction: Callable[[ContrastMoments], Tensor]
    needs: tuple[str, ...] = ()
    pairs: bool = False
    package: str | None = None

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.direction.__doc__

    def check(self, name: str, paired: bool) -> None:
        """Says what is missing before a pass is run. Raises ContrastError for want of pairs, ConfigError for want of a package."""
        if self.pairs and not paired:
            raise ContrastError(
                f"'{name}' compares the two texts of a pair",
                expected="a paired contrast set",
                found="two sets of unrelated texts",
                remedy="make pairs with ContrastSet.from_pairs, or choose another method",
            )
        if self.package is not None:
            extra(self.package)


EXTRACTORS: Registry[Any] = Registry("extractor", "steer.directions.extractors", "steer.extractors")


def extractor(
    name: str, *, needs: tuple[str, ...] = (), pairs: bool = False, package: str | None = None
) -> Callable[[Callable[[ContrastMoments], Tensor]], Extractor]:
    """Registers a function as the extractor of that name."""

    def add(function: Callable[[ContrastMoments], Tensor]) -> Extractor:
        return EXTRACTORS.register(name)(Extractor(function, needs, pairs, package))

    return add


def extra(module: str) -> Any:
    """Imports a module that the extra `directions` installs. Raises ConfigError with the command that does."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this method needs '{module.partition('.')[0]}'",
            expected="scikit-learn and concept-erasure, which the extra `directions` installs",
            found=f"no module '{error.name}'",
            remedy="pip install 'torchsteer[directions]'",
        ) from error
