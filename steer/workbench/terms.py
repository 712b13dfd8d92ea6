"""Terms of a plan as the page shows them: what can be moved, over which range, and the text that a moved plan has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer.checks import number_within, of_type, one_of
from steer.directions import Direction, Directions
from steer.directions.text import Gates, Names, plan_from_text, plan_to_text
from steer.directions.text_reader import Reader, Term
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary
from steer.intervene import Intervention, Plan
from steer.intervene.scope import Scope, decimal
from steer.model.sites import Sites

LARGEST = 1e6  # strength that a page may ask for
MOVABLE = ("strength", "scope", "site")


def spelt_out(text: str, names: Names, gates: Gates) -> tuple[Plan, str]:
    """A plan and its text with every site and scope. Raises ConfigError, SiteError, WrongModelError, as `plan_from_text`."""
    plan = plan_from_text(text, names, gates)
    return plan, plan_to_text(plan, names, gates)


def moved(text: str, changes: Sequence[Mapping[str, Any]], names: Names, gates: Gates) -> str:
    """The text of a plan after its terms were moved.

    Args:
        text: of the plan before, every site spelt out.
        changes: `term` (its number, from 0) and what changes: `strength`, `scope`, `site`.

    Raises:
        ConfigError: no such term, no finite strength, a scope that cannot be read, a site where the direction was not read.
    """
    terms = Reader(text).terms()
    of_type(changes, (list, tuple), "the changes of a plan", "send a list of {term, strength, scope, site}")
    for change in changes:
        of_type(change, Mapping, "a change of a plan", "send {term, strength, scope, site}")
        number = change.get("term")
        if type(number) is not int or not 0 <= number < len(terms):
            raise _no_term(number, len(terms))
        _move(terms[number], change, names)
    return " ".join(map(_written, terms)).removeprefix("+ ")


def described(plan: Plan, text: str, names: Names) -> list[dict[str, Any]]:
    """The terms of a plan for the page, JSON-able, in the order of the text.

    Each has `name` (of its intervention), `what` it does, `strength` and the `bound` of its slider on either side, `scope`, `site` and the
    `sites` that it can be moved to, `gate`, `dose` (|edit| / |h| at strength 1, None where it is not known) and `about` its direction.
    """
    return [_described(term, of_plan, names) for term, of_plan in zip(Reader(text).terms(), plan.interventions, strict=True)]


def _described(term: Term, intervention: Intervention, names: Names) -> dict[str, Any]:
    named = names[term.name]
    sites = [str(intervention.site)] if isinstance(intervention.site, Sites) else _sites_of(named, str(intervention.site))
    direction = named[str(intervention.site)] if isinstance(named, Directions) and len(sites) > 1 else _only_direction(named)
    return {
        "name": intervention.name,
        "what": _what(term),
        "source": term.name,
        "strength": term.strength,
        "bound": bound_of(term.strength),
        "scope": str(intervention.scope),
        "site": str(intervention.site),
        "sites": sites,
        "gate": term.gate,
        "features": _features(term) if isinstance(named, Dictionary) else [],
        "dose": _dose(direction) if term.operator == "add" else None,
        "about": _about(named, direction),
    }


def bound_of(strength: float) -> float:
    """The end of a slider: twice the strength, at least 1, rounded up to 1, 2 or 5 times a power of ten.

    Example:
        >>> bound_of(0.4), bound_of(3.0)
        (1.0, 10.0)
    """
    wanted = max(2 * abs(strength), 1.0)
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= wanted)


def _sites_of(named: Any, site: str) -> list[str]:
    """Where a term may act: a direction of another layer is another vector, so only where there is one."""
    return list(map(str, named)) if isinstance(named, Directions) and site in named else [site]


def _only_direction(named: Any) -> Direction | None:
    if isinstance(named, Directions):
        return next(iter(named.values())) if len(named) == 1 else None
    return named if isinstance(named, Direction) else None


def _dose(direction: Direction | None) -> float | None:
    return None if direction is None or "activation_norm" not in direction.metrics else direction.relative_dose()


def _about(named: Any, direction: Direction | None) -> str:
    if direction is None:
        return repr(named)
    metrics = (("auc", "AUC"), ("dprime", "d'"))
    judged = "".join(f", {word} {direction.metrics[name]:.3g}" for name, word in metrics if name in direction.metrics)
    return f"{direction.method} of {direction.span}, length {float(direction.vector.norm()):.3g}{judged}"


def _features(term: Term) -> list[int]:
    """The features that a term names, for the choice of what colours tokens."""
    words = term.words or {}
    several = words.get("features", [words["feature"]] if "feature" in words else [])
    return [feature for feature in several if type(feature) is int] if isinstance(several, list) else []


def _move(term: Term, change: Mapping[str, Any], names: Names) -> None:
    what = f"of '{term.name}'"
    for key in change:
        if key != "term":
            one_of(key, MOVABLE, f"what changes {what}")
    if "strength" in change:
        number_within(change["strength"], f"the strength {what}", -LARGEST, LARGEST)
        term.strength = change["strength"]
    if "scope" in change:
        of_type(change["scope"], str, f"the scope {what}", "write it as text, e.g. 'response'")
        term.scope = str(Scope.parse(change["scope"]))
    if "site" in change:
        assert term.site is not None  # it was spelt out
        term.site = one_of(change["site"], _sites_of(names[term.name], term.site), f"the site {what}")


def _what(term: Term) -> str:
    """Operator, name and words, e.g. `clamp(sae, feature=5, to=3)`, `ablate warm`; the name alone for what is added."""
    if term.words is not None:
        return f"{term.operator}({', '.join([term.name, *(f'{word}={json.dumps(value)}' for word, value in term.words.items())])})"
    return term.name if term.operator == "add" else f"{term.operator} {term.name}"


def _written(term: Term) -> str:
    """A term with its sign, as `plan_from_text` reads it."""
    sign = "-" if term.strength < 0 else "+"
    gate = "" if term.gate is None else f" ?{term.gate}"
    place = "" if term.site is None else f":{term.site}"
    return f"{sign} {decimal(abs(term.strength))} {_what(term)}{place}@{term.scope}{gate}{' ^' * term.preserve_norm}"


# ---- errors


def _no_term(number: object, count: int) -> ConfigError:
    return ConfigError("no such term of the plan", expected=f"a number from 0 to {count - 1}", found=repr(number), remedy="reload the page")
