"""Steering from a configuration: a plan's text, and where its directions and gates come from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from steer.directions.direction import Directions
from steer.directions.text import direction_at, plan_from_text, plan_to_text
from steer.errors import ConfigError, SteerError, did_you_mean
from steer.intervene import GATES, Gate, Plan
from steer.intervene.gate import SiteGate
from steer.model.site import Site


def plan_from_config(text: str, directions: Mapping[str, str], gates: Mapping[str, Mapping[str, Any]]) -> tuple[Plan, str]:
    """Reads a plan.

    Args:
        text: see `steer.directions.text`.
        directions: name -> path of saved `Directions`.
        gates: name -> `gate` (its kind), `direction` (name of the vector that it compares with) and the options of that kind. It reads
            where its direction was read; `site` chooses one of several.

    Returns:
        The plan, and its text with every site and scope spelt out.

    Raises:
        ConfigError, FileError, WrongModelError.
    """
    names = {name: Directions.load(path) for name, path in directions.items()}
    known = {name: _gate(name, spec, names) for name, spec in gates.items()}
    plan = plan_from_text(text, names, known)
    return plan, plan_to_text(plan, names, known)


def _gate(name: str, spec: Mapping[str, Any], names: Mapping[str, Directions]) -> Gate:
    example = f"e.g. gates.{name}.gate=cosine gates.{name}.direction=harm gates.{name}.threshold=0.1"
    if not isinstance(spec, Mapping) or not {"gate", "direction"} <= spec.keys():
        raise ConfigError(
            f"gate '{name}' is incomplete",
            expected=f"gates.{name}.gate=<kind> and gates.{name}.direction=<name>",
            found=", ".join(spec) if isinstance(spec, Mapping) else spec,
            remedy=example,
        )
    options = dict(spec)
    if (wanted := options.pop("gate")) not in (kinds := [one for one in GATES if one != "call"]):  # which takes a function
        remedy = did_you_mean(str(wanted), kinds) or "choose one of these; a gate of your own is made in Python"
        raise ConfigError(f"gate '{name}': unknown gate '{wanted}'", expected=f"one of {', '.join(kinds)}", found=wanted, remedy=remedy)
    kind: Any = GATES.get(wanted)
    if (called := options.pop("direction")) not in names:
        expected = f"one of {', '.join(names)}" if names else "a direction, but none was given"
        remedy = did_you_mean(str(called), names) or f"give its file with directions.{called}=<path>"
        raise ConfigError(f"gate '{name}': no direction is called '{called}'", expected=expected, found=called, remedy=remedy)
    own = list(inspect.signature(kind).parameters)
    known = [one for one in (*own[1:], *inspect.signature(SiteGate).parameters) if one not in ("options", "tensors", "width")]
    if unknown := sorted(set(options) - set(known)):
        remedy = did_you_mean(unknown[0], known) or f"leave gates.{name}.{unknown[0]} out"
        raise ConfigError(f"gate '{name}' has no option '{unknown[0]}'", expected=", ".join(known), found=unknown[0], remedy=remedy)
    site = options.get("site")
    direction, options["site"] = direction_at(names[called], None if site is None else Site.parse(site))
    try:
        return kind(direction.vector, **options)
    except SteerError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"gate '{name}' cannot be made",
            expected="a kind that compares with a vector, and values that it can take",
            found=error,
            remedy=example,
        ) from error
