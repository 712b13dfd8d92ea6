"""Metric names that every logger takes as they are: letters, digits, `_`, `-`, `.`, and `/` between the parts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from steer.errors import ConfigError

LONGEST = 240  # of MLflow's 250, which a trainer's own `train/` and `eval_` need, too
_REPLACED = {"@": "/", ":": "."}  # as in `add@layers.3.output` and `module:norm:output`
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]")


def metric_name(*parts: str) -> str:
    """Joins parts into the name of a metric.

        metric_name("steer", "add@layers.3.output", "strength")  # steer/add/layers.3.output/strength

    MLflow refuses `@` and names that are no normal paths, TensorBoard replaces spaces, and each framework renames in its own way what a
    logger does not take. Here `@` becomes `/`, `:` becomes `.`, and anything else that some logger does not take becomes `_`.
    """
    text = "/".join(parts)
    for character, replacement in _REPLACED.items():
        text = text.replace(character, replacement)
    name = "/".join(_component(component) for component in text.split("/"))
    if len(name) <= LONGEST:
        return name
    return f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}-{name[-120:]}"


def _component(text: str) -> str:
    plain = _FORBIDDEN.sub("_", text)
    rest = plain.lstrip(".")
    dots = len(plain) - len(rest)
    if rest and dots < 2:
        return plain
    return "_" * max(1 - len(rest), dots) + rest  # an empty one, `.` and what begins with `..` mean something else in a path


def check_metric_names(names: Iterable[str], what: str) -> None:
    """Raises ConfigError where two names would be one metric.

    Args:
        names: with all that distinguishes them, e.g. `warm@layers.3.output`.
        what: what they name, for the message.
    """
    known: dict[str, str] = {}
    for name in names:
        metric = metric_name(name)
        if (other := known.setdefault(metric, name)) != name:
            raise _same_metric(what, other, name, metric)


# ---- errors


def _same_metric(what: str, one: str, other: str, metric: str) -> ConfigError:
    return ConfigError(
        f"two {what} would be logged under one name",
        expected="names that differ in letters, digits, '_', '-', '.' or '/'",
        found=f"'{one}' and '{other}', both '{metric}'",
        remedy="rename one of them",
    )
