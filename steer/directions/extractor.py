"""Extractors: from contrast moments to a direction. A new one is a file with one registered function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.checks import errors_of, of_type
from steer.directions.moments import NEEDS, ContrastMoments
from steer.errors import ConfigError, ContrastError, WidthError, did_you_mean
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
        """Says what is missing before a pass is run. Raises ContrastError for want of pairs, ConfigError for want of a package and for
        `needs` that nothing is known by."""
        check_needs(name, self.needs)
        if self.pairs and not paired:
            raise _pairs_error(name)
        if self.package is not None:
            extra(self.package)

    def read(self, name: str, moments: ContrastMoments) -> Tensor:
        """[width] fp64, what `direction` gives, with a largest entry of 1 where its length is beyond what can be squared.

        Args:
            name: what the errors call the extractor.

        Raises:
            ConfigError: it fails, or gives no dense tensor, one of whole numbers, or zeros where the class means differ.
            WidthError: another shape. NonFiniteError: NaN or infinity.
        """
        with errors_of(f"the extractor '{name}'", "let its function take the moments of one site and return a [width] vector"):
            vector = self.direction(moments.copy(self.needs))  # another extractor reads the same moments
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or vector.is_meta or vector.layout is not torch.strided:
            raise _kind_error(name, vector)
        if vector.shape != moments.gap.shape:
            raise _vector_error(name, vector, len(moments.gap))
        check_finite(vector, f"what the extractor '{name}' gives")
        vector = vector.detach().double().cpu()
        largest = float(vector.abs().max())
        if largest == 0 and bool(moments.gap.any()):
            raise _zeros_error(name, len(vector))
        return vector if largest == 0 or 1e-100 < largest < 1e100 else vector / largest


EXTRACTORS: Registry[Extractor] = Registry("extractor", "steer.directions.extractors", "steer.extractors", instance_of=Extractor)


def extractor(
    name: str, *, needs: tuple[str, ...] = (), pairs: bool = False, package: str | None = None
) -> Callable[[Callable[[ContrastMoments], Tensor]], Extractor]:
    """Registers a function as the extractor of that name; the options are those of `Extractor`.

    Raises:
        ConfigError: unknown `needs`, or as `Registry.register`.
    """
    register = EXTRACTORS.register(name)
    check_needs(name, needs)
    of_type(pairs, bool, f"`pairs` of the extractor '{name}'", "pass True or False")
    if package is not None:
        of_type(package, str, f"`package` of the extractor '{name}'", "pass the name of a module, e.g. package='sklearn'")

    def add(function: Callable[[ContrastMoments], Tensor]) -> Extractor:
        of_type(function, Callable, f"the function of the extractor '{name}'", "put the decorator above a function")  # type: ignore[arg-type]
        return register(Extractor(function, tuple(needs), pairs, package))

    return add


def extractor_of(name: str) -> Extractor:
    """The extractor of that name. Raises ConfigError for an unknown one, and for one that was not registered as an extractor."""
    found = EXTRACTORS.get(name)
    of_type(found, Extractor, f"extractor '{name}'", f"register its function with @extractor('{name}')")
    return found


def check_needs(name: str, needs: tuple[str, ...]) -> None:
    """Raises ConfigError unless these are keys of `moments.NEEDS`."""
    of_type(needs, (tuple, list), f"`needs` of the extractor '{name}'", f"pass a tuple, e.g. needs=('{next(iter(NEEDS))}',)")
    for need in needs:
        if need not in NEEDS:
            raise _needs_error(name, need)


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
        expected="a [width] tensor in floating point, dense and in memory",
        found=f"a tensor of {vector.dtype}, {vector.layout} on {vector.device}"
        if isinstance(vector, Tensor)
        else f"{type(vector).__name__} {str(vector)[:60]!r}",
        remedy="let its function return a vector such as `moments.gap`",
    )


def _vector_error(name: str, vector: Tensor, width: int) -> WidthError:
    return WidthError(
        f"the extractor '{name}' gives no direction of this site",
        expected=f"the shape [{width}], one number for each dimension",
        found=list(vector.shape),
        remedy="let its function return one vector as wide as `moments.gap`",
    )


def _zeros_error(name: str, width: int) -> ConfigError:
    return ConfigError(
        f"the extractor '{name}' gives a vector that is zero",
        expected="a direction, of any length: the class means differ at this site",
        found=f"{width} zeros",
        remedy="correct its function, or use another method",
    )


def _needs_error(name: str, need: Any) -> ConfigError:
    return ConfigError(
        f"the extractor '{name}' needs what is not kept",
        expected=f"`needs` among {', '.join(NEEDS)}",
        found=repr(need),
        remedy=did_you_mean(str(need), NEEDS) or "leave it out: class means are always there",
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
