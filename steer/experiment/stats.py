"""Numbers of an experiment that arrive from outside, checked; Student's interval of a mean; numbers as a sentence shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from steer.errors import ConfigError, NonFiniteError

LEVEL = 0.95
ALPHA = 0.05
ROUNDING = 1e-9  # 1 - 0.95 is not 0.05: p values within this share of a level count as equal to it

Array = NDArray[np.float64]
Values = Sequence[float] | Tensor | Array
Table = Sequence[float] | Sequence[Sequence[float]] | Tensor | Array  # [items] or [items, seeds]


@dataclass(frozen=True)
class Interval:
    """A mean over n items and its confidence interval at `LEVEL`."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Values, *, what: str = "values") -> Interval:
    """Mean with Student's t interval; without any variation the interval is the mean itself.

    On normal items it covers the true mean in 95 % of samples at any n; a BCa bootstrap covers it in 93 % at 24 to 36 items, and in 78 % at
    four. On skewed items both fall short alike.

    Args:
        values: [n], one per item; n >= 2.
        what: their name in errors.

    Raises:
        ConfigError: fewer than two values. NonFiniteError: a value that is nan or infinite.

    Example:
        >>> interval([0.1, 0.3, 0.2, 0.4])
        Interval(mean=0.25, low=0.044..., high=0.455..., n=4)
    """
    x = items_and_seeds(values, what).mean(1)  # [n]
    mean = float(x.mean())
    if bool((x == x[0]).all()):
        return Interval(mean, mean, mean, len(x))
    deviations = x - mean
    scale = float(abs(deviations).max())  # squares of tiny or huge values would leave the range of a float
    error = scale * float((deviations / scale).std(ddof=1)) / len(x) ** 0.5
    half = float(student.ppf((1 + LEVEL) / 2, len(x) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(x))


def items_and_seeds(values: Table, what: str) -> Array:
    """Values as a table [items, seeds] in float64; a plain list is one seed.

    Raises:
        ConfigError: what is no table of numbers, has a missing cell, or has fewer than two items. NonFiniteError: nan or infinity.
    """
    remedy = "give a number for each item, or a row for each item with a number for each seed; run the cells that are missing"
    try:
        table = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError, RuntimeError):  # rows of unequal length, or no array at all
        raise _no_numbers(what, values, remedy) from None
    if table.dtype.kind not in "biuf":  # None, text
        raise _no_numbers(what, values, remedy)
    table = table.astype(np.float64)
    if table.ndim == 1:
        table = table[:, None]  # [items, 1]
    if table.ndim != 2 or (table.shape[1] == 0 and len(table)):
        raise _no_table(what, table.shape, remedy)
    if len(table) < 2:
        raise _too_few(what, len(table))
    if not np.isfinite(table).all():
        raise _non_finite(what, table)
    return table


def paired(of_a: Table, of_b: Table, what: str, a: str, b: str) -> Array:
    """Differences a - b, [items, seeds], of two arms that were measured on the same items and seeds."""
    values_a, values_b = items_and_seeds(of_a, f"{what} of {a}"), items_and_seeds(of_b, f"{what} of {b}")
    if values_a.shape != values_b.shape:
        raise _unpaired(f"{what} of {a} and {b}", values_a.shape, values_b.shape)
    return values_a - values_b


def between_0_and_1(value: float, name: str) -> float:
    """A level, an alpha or a power. Raises ConfigError outside (0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise _no_share(name, value)
    return float(value)


def written(*values: float, signed: bool = False) -> list[str]:
    """Numbers that stand beside each other: two decimals, more where two would hide the sign of one of them; no signed zero.

    Three significant digits where all are tiny or one is huge.
    """
    largest = max(map(abs, values))
    if 0 < largest < 0.005 or largest >= 1e6:
        form = ".3g"
    else:  # of what is 0 but for rounding there is no sign to be seen
        digits = next((digits for digits in (2, 3, 4, 5) if all(round(x, digits) or abs(x) <= 1e-5 * largest for x in values)), 6)
        form = f".{digits}f"
    texts = [f"{x:{'+' if signed else ''}{form}}" for x in values]
    return [text if float(text) else text.lstrip("+-") for text in texts]


# ---- errors


def _too_few(what: str, items: int) -> ConfigError:
    return ConfigError(f"too few {what} for statistics", expected="at least two items", found=items, remedy="measure more items")


def _no_numbers(what: str, values: object, remedy: str) -> ConfigError:
    expected = "a table of numbers without gaps, [items] or [items, seeds]"
    return ConfigError(f"{what} are no table of numbers", expected=expected, found=str(values)[:80], remedy=remedy)


def _no_table(what: str, shape: tuple[int, ...], remedy: str) -> ConfigError:
    return ConfigError(f"{what} are no table", expected="[items] or [items, seeds]", found=list(shape), remedy=remedy)


def _unpaired(what: str, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> ConfigError:
    found = " and ".join(f"{items} items, {seeds} seed{'s' * (seeds != 1)}" for items, seeds in (of_a, of_b))
    remedy = "measure both on the same items and seeds, in the same order"
    return ConfigError(f"{what} cannot be paired", expected="one value per item and seed in both", found=found, remedy=remedy)


def _non_finite(what: str, table: Array) -> NonFiniteError:
    item, seed = np.argwhere(~np.isfinite(table))[0]
    found = f"{table[item, seed]} at item {item}" + (f", seed {seed}" if table.shape[1] > 1 else "")
    remedy = "look at that item and at the loss; a cell that was not run has to be run first"
    return NonFiniteError(f"{what} are not finite", expected="a finite number for each item and seed", found=found, remedy=remedy)


def _no_share(name: str, value: object) -> ConfigError:
    remedy = "0.05 is usual for alpha, 0.95 for a level, 0.8 for power"
    return ConfigError(f"{name} is no share", expected="a number between 0 and 1", found=value, remedy=remedy)
