"""Numbers as a reader wants them: a real minus sign, sensible digits, and words where there is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeGuard

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


def measured(x: Any) -> TypeGuard[float]:
    """True for a finite number; None, nan, infinity and anything that is no number were not measured."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def number(x: Any, *, signed: bool = False, digits: int | None = None) -> str:
    """`x` with about three significant digits, or `not measured`.

    Args:
        signed: write a plus sign too.
        digits: decimals, instead of a choice by size.
    """
    if not measured(x):
        return NOT_MEASURED
    size = abs(x)
    if digits is None and size and (size < 5e-4 or size >= 1e6):
        text = f"{x:.1e}"
    else:
        text = f"{x:,.{decimals(size) if digits is None else digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    elif signed and x > 0:
        text = f"+{text}"
    return text.replace("-", MINUS).replace(",", NARROW)


def decimals(size: float) -> int:
    """Decimals that leave about three significant digits."""
    return next(count for bound, count in ((0.3, 3), (20, 2), (200, 1), (math.inf, 0)) if size < bound)


def interval(ci: Any, *, signed: bool = False, digits: int | None = None) -> str:
    """`[low, high]`, or an empty string when a bound is missing."""
    if not is_interval(ci):
        return ""
    return f"[{', '.join(number(bound, signed=signed, digits=digits) for bound in ci)}]"


def is_interval(ci: Any) -> TypeGuard[Sequence[float]]:
    """True for two finite bounds."""
    return isinstance(ci, Sequence) and len(ci) == 2 and all(measured(bound) for bound in ci)


def common_digits(estimates: Sequence[tuple[Any, Any]]) -> int | None:
    """Decimals that suit all numbers of a column, one more where they would hide a sign; None leaves the choice to each."""
    sizes = [abs(value) for value, _ in estimates if measured(value)]
    shown = sizes + [abs(bound) for _, ci in estimates if is_interval(ci) for bound in ci]
    if not sizes or max(shown) < 0.005:
        return None
    digits = decimals(max(sizes))
    return min(3, digits + 1) if any(x and not round(x, digits) for x in shown) else digits


def estimate(value: Any, ci: Any, *, signed: bool = False) -> str:
    """`-0.20 [-0.30, -0.10]`: a value and its interval with digits that suit both."""
    digits = common_digits([(value, ci)])
    return " ".join(filter(None, (number(value, signed=signed, digits=digits), interval(ci, signed=signed, digits=digits))))


def p_value(p: Any) -> str:
    """Three decimals, and a bound instead of a zero."""
    if not measured(p):
        return NOT_MEASURED
    return f"<{NARROW}0.001" if p < 0.001 else f"{p:.3f}"


def overhead(fraction: Any, spread: Any = None) -> str:
    """A signed percentage with one decimal; with the range over the rounds where it is known, and a word when that holds zero."""
    if not measured(fraction):
        return NOT_MEASURED
    text = f"{number(100 * fraction, signed=True, digits=1)}{NARROW}%"
    if not is_interval(spread):
        return text
    low, high = spread
    noise = ", within noise" if low <= 0 <= high else ""
    return f"{text} {interval([100 * low, 100 * high], signed=True, digits=1)}{noise}"


def percentage(fraction: float) -> str:
    """A whole percentage."""
    return f"{100 * fraction:.0f}{NARROW}%"


def moment(iso: Any) -> str:
    """An ISO time as date and minute; anything else as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except (TypeError, ValueError):
        return str(iso or "not recorded")
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


def duration(seconds: Any) -> str:
    """`42 s`, `5 min 12 s`, `2 h 3 min`."""
    if not measured(seconds):
        return NOT_MEASURED
    rounded = round(seconds)
    if rounded < 10:
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(rounded, 60)
    hours, remaining_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {remaining_minutes} min"
    return f"{minutes} min {remaining_seconds} s" if minutes else f"{remaining_seconds} s"
