"""Plans as text: `0.4 warm@response - 0.2 verbose@generated[:32]`.

    plan = [sign] term { sign term }
    term = [number] what [":" site] ["@" scope] ["?" gate] ["^"]
    what = [operator] name | operator "(" name { "," word "=" value } ")"

- sign and number: the strength; 1 when there is no number.
- operator: a registered one that needs nothing but a vector, such as `ablate`; `add` when there is none.
- name: of a direction; a word of letters, digits and `_`.
- word and value: what an operator needs beside a dictionary, as in `clamp(sae, feature=5, to=3)` or `add(sae, features=[5,7], amount=2)`; a
  value is a number, `true`, `false` or a list. With a dictionary `clamp`, `ablate`, `keep_only` and `add` mean the operators of features.
- site: one site, as in `warm:layers.12.output`, a pattern such as `layers.*.output`, or several of both with commas and no spaces between
  them. Without it a direction acts where it was read, and of directions read at several sites the one that `Directions.best` chooses. A
  `Direction` alone acts wherever it is told to, `Directions` only where they were read, and at a pattern if there is but one of them. A
  dictionary acts where it was trained.
- scope: as in `steer.intervene.scope`, spaces included; `all` when there is none.
- gate: the name of a gate.
- `^`: the activation keeps the norm that it had before the edit.

Whatever else an intervention can be (schedules, phases, roles, row slots, tensors that are learned) has no text form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from steer.checks import of_type
from steer.directions.direction import Direction, Directions
from steer.directions.text_reader import GRAMMAR, WORD, Reader, Term
from steer.errors import ConfigError, WrongModelError
from steer.intervene import OPERATORS, Gate, Intervention, Operator, Plan
from steer.intervene.file_form import file_form
from steer.intervene.schedules.constant import Constant
from steer.intervene.scope import decimal
from steer.intervene.source import OperatorSource
from steer.model.context import PHASES
from steer.model.fingerprint import CASTS, DIGEST
from steer.model.site import Site
from steer.model.sites import Sites, examples_of, parse_sites

Names = Mapping[str, Direction | Directions | OperatorSource]
Gates = Mapping[str, Gate]


def plan_from_text(text: str, names: Names, gates: Gates | None = None) -> Plan:
    """Reads a plan, see the module's docstring. Each intervention bears the name of its direction.

    Args:
        names: what directions and dictionaries are called.
        gates: what gates are called.
        text: terms such as `0.4 warm@response - 0.2 verbose`.

    Raises:
        ConfigError: what cannot be read, and where; or a name that is not known, and the nearest one.
        WrongModelError: directions of different models.

    Example:
        >>> read = steer.plan_from_text("0.4 kind@response - ablate kind:layers.16.output", {"kind": directions})
        >>> print(read.explain())
    """
    of_type(text, str, "a plan as text", "write e.g. '0.4 warm@response'")
    gates = {} if gates is None else gates
    _check_names("direction", names, (Direction, Directions, OperatorSource))
    _check_names("gate", gates, Gate)
    reader = Reader(text)
    terms = reader.terms()
    interventions = [_intervention(reader, term, names, gates) for term in terms]
    return Plan(interventions, fingerprint=_fingerprint({term.name: names[term.name] for term in terms}))


def _check_names(what: str, named: Any, kinds: type | tuple[type, ...]) -> None:
    of_type(named, Mapping, f"the named {what}s", f"pass {{name: {what}}}")
    for name, value in named.items():
        of_type(value, kinds, f"'{name}' among the named {what}s", f"pass a steer.{what.title()}")


def _intervention(reader: Reader, term: Term, names: Names, gates: Gates) -> Intervention:
    key = (term.operator, term.name, term.site, json.dumps(term.words))
    if key not in reader.edits:
        reader.edits[key] = _edit(reader, term, names)
    edit, site = reader.edits[key]
    with reader.located(term.at.get("scope", 0)):
        scope = reader.scope(term.scope)
    if term.gate is not None:
        reader.known("gate", term.gate, gates, term.at["gate"])
    with reader.located(term.at["number"]):
        gate = None if term.gate is None else gates[term.gate]
        return Intervention(edit.copy({}), site, scope, term.strength, gate=gate, preserve_norm=term.preserve_norm, name=term.name)


def _edit(reader: Reader, term: Term, names: Names) -> tuple[Operator, Site | Sites]:
    """What a term does, and where. Raises ConfigError."""
    named = names.get(term.name)
    if term.words is not None or isinstance(named, OperatorSource):
        return _edit_of_source(reader, term, names)
    if term.operator not in OPERATORS and term.operator in names:
        what = f"'{term.operator}' and '{term.name}' stand side by side"
        reader.fail(what, GRAMMAR, "put a + or - between two directions", term.at["name"])
    with reader.located(term.at["operator"]):
        operator = OPERATORS.get(term.operator)
    reader.known("direction", term.name, names, term.at["name"])
    assert named is not None
    with reader.located(term.at.get("site", term.at["name"])):
        direction, site = direction_at(named, None if term.site is None else _sites(term.site))
    with reader.located(term.at["operator"]):
        edit = _operator_of(operator, direction)
        for example in examples_of(site):
            edit.check_site(example)
    return edit, site


def _edit_of_source(reader: Reader, term: Term, names: Names) -> tuple[Operator, Site | Sites]:
    """The same for an operator with words of its own."""
    reader.known("dictionary", term.name, names, term.at["name"])
    source = names[term.name]
    if not isinstance(source, OperatorSource):
        reader.fail(
            f"'{term.name}' is a direction", "a dictionary between these brackets", f"write '{term.operator} {term.name}'", term.at["name"]
        )
    if term.words is None:
        example = f"clamp({term.name}, feature=5, to=3)"
        reader.fail(f"'{term.name}' is a dictionary", "an operator with its words", f"write e.g. '{example}'", term.at["name"])
    with reader.located(term.at["operator"]):
        operator = OPERATORS.get(source.short_names.get(term.operator, term.operator))
        try:
            edit = source.operator(operator, term.words)
        except TypeError as error:
            raise _words_error(operator, error) from None
    site = source.text_site() if term.site is None else None
    with reader.located(term.at.get("site", term.at["name"])):
        if term.site is None and site is None:
            raise _no_site_error(term.name)
        where = site or _sites(term.site or "")
        for example_site in examples_of(where):
            edit.check_site(example_site)
    return edit, where


def _sites(written: str) -> Site | Sites:
    """A site, a pattern, or several of both with commas between them."""
    return parse_sites(written.split(",") if "," in written else written)


def direction_at(named: Direction | Directions, site: Site | Sites | None) -> tuple[Direction, Site | Sites]:
    """The direction that is meant, and where it acts. Raises ConfigError where it is not clear which of several goes to several sites."""
    if isinstance(named, Directions):
        if isinstance(site, Sites) and len(named) > 1:
            raise _one_of_several_error(named, site)
        if isinstance(site, Site):
            named = named[site]
        else:
            named = named[next(iter(named))] if len(named) == 1 else named.best()
    return named, site or named.site


def _operator_of(operator: type[Operator], direction: Direction) -> Operator:
    """The operator that is made of nothing but a direction. Raises ConfigError when it needs more."""
    make: Any = operator
    try:
        return make(direction.vector)
    except TypeError as error:
        raise _operator_error(operator, error) from None


def _fingerprint(used: Names) -> dict[str, Any] | None:
    """Fingerprint of the model that the directions were read from, where that is known. Raises WrongModelError for several models."""
    known = {
        name: directions.provenance["model"]
        for name, directions in used.items()
        if isinstance(directions, Directions) and directions.provenance.get("model") is not None
    }
    if not known:
        return None
    first = next(iter(known))
    for name, fingerprint in known.items():
        if _without_digest(fingerprint) != _without_digest(known[first]):
            raise _models_error(first, known[first], name, fingerprint)
    return known[first]


def _without_digest(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fingerprint.items() if key not in (DIGEST, CASTS)}


def plan_to_text(plan: Plan, names: Names, gates: Gates | None = None) -> str:
    """Writes a plan so that `plan_from_text` gives an equal one, with every site and scope spelt out.

    Args:
        plan: of interventions that have a text form.
        names, gates: as of `plan_from_text`.

    Raises:
        ConfigError: an intervention that has no text form, or whose vector or gate is none of those that are named.

    Example:
        >>> plan = steer.plan_from_text("0.4 kind@response", {"kind": direction})
        >>> steer.plan_to_text(plan, {"kind": direction})
        '0.4 kind:layers.12.output@response'
    """
    texts = []
    for intervention in plan.interventions:
        operator_name, _ = file_form(intervention.operator, OPERATORS)
        if not WORD.fullmatch(operator_name):
            raise _extras_error(intervention, [f"an operator whose name is no word, '{operator_name}'"])
        name = _name_of(intervention, names)
        if isinstance(names[name], OperatorSource):
            words, what = [], _call(operator_name, name, intervention.operator)
        else:
            words, what = [] if operator_name == "add" else [operator_name], name
        site_and_scope = f"{what}:{intervention.site}@{intervention.scope}"
        gate = "" if intervention.gate is None else f" ?{_gate_of(intervention, gates or {})}"
        strength = intervention.strength[0]
        texts += [
            "-" if strength < 0 else "+",
            " ".join([decimal(abs(strength)), *words, site_and_scope]) + gate + " ^" * intervention.preserve_norm,
        ]
    lead = texts.pop(0).replace("+", "")  # no space after the first sign
    return lead + " ".join(texts)


def _name_of(intervention: Intervention, names: Names) -> str:
    """The name of the direction that an intervention is made of. Raises ConfigError."""
    extras = {
        "row slots": intervention.slots > 1,
        "a schedule": intervention.schedule != Constant(),
        f"phases {intervention.phases}": intervention.phases != PHASES,
        f"roles {intervention.roles}": intervention.roles != ("policy",),
        "a switch that is off": not intervention.enabled,
        "tensors that are learned": bool(intervention.parameters),
    }
    if any(extras.values()):
        raise _extras_error(intervention, [what for what, present in extras.items() if present])
    own = intervention.name.split("#")[0]  # plans number names that repeat
    for name in sorted(names, key=lambda name: name != own):
        named = names[name]
        if isinstance(named, OperatorSource):
            if _is_made_of(intervention.operator, named):
                return name
            continue
        if isinstance(named, Directions) and not _is_clear(named, intervention.site):
            continue
        direction, _ = direction_at(named, intervention.site)
        if len(direction.vector) == intervention.operator.width and _same_operator(intervention.operator, direction):
            return name
    raise _unnamed_error(intervention, names)


def _is_made_of(operator: Operator, source: OperatorSource) -> bool:
    """True when the operator is what its words make of the source."""
    words = operator.words()
    if words is None:
        return False
    try:
        expected = source.operator(type(operator), words)
    except (ConfigError, TypeError):
        return False
    return expected.options() == operator.options() and _same_tensors(expected.tensors, operator.tensors)


def _call(operator: str, name: str, made: Operator) -> str:
    """The operator with the name and its words between brackets."""
    words = {word: _value(value) for word, value in (made.words() or {}).items()}
    return f"{operator}({', '.join([name, *(f'{word}={value}' for word, value in words.items())])})"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return decimal(value) if isinstance(value, float) else json.dumps(value)


def _is_clear(named: Directions, site: Site | Sites) -> bool:
    """One of several directions is meant at a site."""
    return len(named) == 1 if isinstance(site, Sites) else site in named.entries


def _same_operator(operator: Operator, direction: Direction) -> bool:
    """True when the operator is what its class makes of the direction."""
    try:
        expected = _operator_of(type(operator), direction)
    except ConfigError:
        return False
    return expected.options() == operator.options() and _same_tensors(expected.tensors, operator.tensors)


def _same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def _same_gate(a: Gate, b: Gate) -> bool:
    """Plans work on copies of their gates."""
    of_a = list(a.site_gates())
    of_b = list(b.site_gates())
    try:
        return a.to_dict() == b.to_dict() and all(_same_tensors(x.tensors, y.tensors) for x, y in zip(of_a, of_b, strict=True))
    except ConfigError:  # a Python function has no file form
        return str(a) == str(b) and [gate.number for gate in of_a] == [gate.number for gate in of_b]


def _gate_of(intervention: Intervention, gates: Gates) -> str:
    assert intervention.gate is not None
    for name, gate in gates.items():
        if _same_gate(gate, intervention.gate):
            return name
    raise _gate_error(intervention, gates)


def _operator_error(operator: type[Operator], error: TypeError) -> ConfigError:
    return ConfigError(
        f"operator '{operator.name}' needs more than a direction",
        expected="one that needs nothing but a vector, such as add or ablate",
        found=str(error),
        remedy=f"build the plan in Python, with an Intervention({operator.__name__}(...), ...)",
    )


def _words_error(operator: type[Operator], error: TypeError) -> ConfigError:
    return ConfigError(
        f"operator '{operator.name}' is not made of these words",
        expected="the arguments of an operator of features, such as feature=5, to=3 of clamp",
        found=str(error),
        remedy=f"see help(steer.{operator.__name__})",
    )


def _no_site_error(name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' writes several sites",
        expected="a site in the text",
        found="none",
        remedy="write ':' and the site behind it",
    )


def _one_of_several_error(named: Directions, site: Sites) -> ConfigError:
    return ConfigError(
        f"it is not clear which direction acts at '{site}'",
        expected="one direction, which acts at all of these sites",
        found=f"{len(named)} directions, at {', '.join(map(str, list(named.entries)[:3]))}{', ...' * (len(named) > 3)}",
        remedy="name one of them, e.g. directions.best(), or write a term for each site",
    )


def _models_error(first: str, expected: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> WrongModelError:
    return WrongModelError(
        f"'{first}' and '{name}' were read from different models",
        expected=_without_digest(expected),
        found=_without_digest(found),
        remedy="extract both on the model that is to be steered",
    )


def _extras_error(intervention: Intervention, extras: list[str]) -> ConfigError:
    return ConfigError(
        f"'{intervention.name}' has no text form",
        expected="an operator, a direction, a site, a scope, a strength and a gate alone",
        found=", ".join(extras),
        remedy="keep the plan in a file: plan.save(path)",
    )


def _unnamed_error(intervention: Intervention, names: Names) -> ConfigError:
    known = ", ".join(names) or "the directions, of which there are none"
    return ConfigError(
        f"'{intervention.name}' has no text form",
        expected=f"what '{intervention.operator.name}' makes of one of {known}",
        found=f"other tensors or settings, at {intervention.site}",
        remedy="give the direction that it was made of, or keep the plan in a file: plan.save(path)",
    )


def _gate_error(intervention: Intervention, gates: Gates) -> ConfigError:
    return ConfigError(
        f"the gate of '{intervention.name}' has no name",
        expected=f"one of {', '.join(gates)}" if gates else "a named gate",
        found=str(intervention.gate),
        remedy="give it in gates={name: gate}",
    )
