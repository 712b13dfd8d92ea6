"""Extractors: from contrast moments to a direction. A new one is a file with one registered function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.directions.moments import ContrastMoments
from steer.errors import ConfigError, ContrastError, WidthError
from steer.intervene.operator import check_finite
from steer.registry import Registry

EXTRA_PACKAGES = ("sklearn", "concept_erasure")  # modules that the extra `directions` installs


@dataclass(frozen=True)
class Extractor:
    """A method that reads a direction off contrast moments.

    Attributes:
        direction: gives a [width] vector of any length and sign, in floating point.
        needs: what it reads beyond the class means, keys of `moments.NEEDS`.
        pairs: it is only defined on pairs.
        package: a module that it imports when it runs, of the extra `directions` or of any other package.
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
            raise _pairs_error(name)
        if self.package is not None:
            extra(self.package)

    def read(self, name: str, moments: ContrastMoments) -> Tensor:
        """[width] fp64, what `direction` gives.

        Args:
            name: what the errors call the extractor.

        Raises:
            ConfigError: it gives no tensor, or one of whole numbers. WidthError: another shape. NonFiniteError: NaN or infinity.
        """
        vector = self.direction(moments)
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            raise _kind_error(name, vector)
        if vector.shape != moments.gap.shape:
            raise _vector_error(name, vector, len(moments.gap))
        check_finite(vector, f"what the extractor '{name}' gives")
        return vector.detach().double().cpu()


EXTRACTORS: Registry[Extractor] = Registry("extractor", "steer.directions.extractors", "steer.extractors", instance_of=Extractor)


def extractor(
    name: str, *, needs: tuple[str, ...] = (), pairs: bool = False, package: str | None = None
) -> Callable[[Callable[[ContrastMoments], Tensor]], Extractor]:
    """Registers a function as the extractor of that name. Raises ConfigError as `Registry.register`."""
    register = EXTRACTORS.register(name)

    def add(function: Callable[[ContrastMoments], Tensor]) -> Extractor:
        return register(Extractor(function, needs, pairs, package))

    return add


def extra(module: str) -> Any:
    """Imports a module that an extractor needs. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _package_error(module, error) from error


def _pairs_error(name: str) -> ContrastError:
    return ContrastError(
        f"'{name}' compares the two texts of a pair",
        expected="a paired contrast set",
        found="two sets of unrelated texts",
        remedy="make pairs with ContrastSet.from_pairs, or choose another method",
    )


def _kind_error(name: str, vector: object) -> ConfigError:
    return ConfigError(
        f"the extractor '{name}' gives no direction",
        expected="a [width] tensor in floating point",
        found=f"a tensor of {vector.dtype}" if isinstance(vector, Tensor) else f"{type(vector).__name__} {str(vector)[:60]!r}",
        remedy="let its function return a vector such as `moments.gap`",
    )


def _vector_error(name: str, vector: Tensor, width: int) -> WidthError:
    return WidthError(
        f"the extractor '{name}' gives no direction of this site",
        expected=f"the shape [{width}], one number for each dimension",
        found=list(vector.shape),
        remedy="let its function return one vector as wide as `moments.gap`",
    )


def _package_error(module: str, error: ModuleNotFoundError) -> ConfigError:
    package = module.partition(".")[0]
    missing = str(error.name).partition(".")[0]
    is_ours = package in EXTRA_PACKAGES
    return ConfigError(
        f"this method needs '{package}'",
        expected="scikit-learn and concept-erasure, which the extra `directions` installs" if is_ours else f"the package of '{missing}'",
        found=f"no module '{error.name}'",
        remedy="pip install 'torchsteer[directions]'" if is_ours else f"pip install {missing}, or what else brings the module '{missing}'",
    )
