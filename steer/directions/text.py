"""Plans as text: `0.4 warm@response - 0.2 verbose@generated[:32]`.

    plan = [sign] term { sign term }
    term = [number] [operator] name [":" site] ["@" scope] ["?" gate] ["^"]

- sign and number: the strength; 1 when there is no number.
- operator: a registered one that needs nothing but a vector, such as `ablate`; `add` when there is none.
- name: of a direction; a word of letters, digits and `_`.
- site: one site, as in `warm:layers.12.output`. Without it a direction acts where it was read, and of directions read at several sites
  the one that `Directions.best` chooses. A `Direction` alone acts wherever it is told to, `Directions` only where they were read.
- scope: as in `steer.intervene.scope`, spaces included; `all` when there is none.
- gate: the name of a gate.
- `^`: the activation keeps the norm that it had before the edit.

Whatever else an intervention can be (schedules, phases, roles, row slots, tensors that are learned) has no text form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from steer.checks import of_type
from steer.directions.direction import Direction, Directions
from steer.errors import ConfigError, SteerError, WrongModelError, did_you_mean
from steer.intervene import OPERATORS, Gate, Intervention, Operator, Plan, Scope
from steer.intervene.schedules.constant import Constant
from steer.intervene.scope import decimal
from steer.model.context import PHASES
from steer.model.site import Site

Names = Mapping[str, Direction | Directions]
Gates = Mapping[str, Gate]

GRAMMAR = '[number] [operator] name [":" site] ["@" scope] ["?" gate] ["^"], joined by + and -'
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?=\s)")
_WORD = re.compile(r"[^\W\d]\w*")
_SITE = re.compile(r"module:[^\s@?^]+?:(?:input|output)|(?:[^\s@?^+\-]|(?<=\.)-)+")  # layers.-1.output has a sign of its own
_SCOPE = re.compile(r"(?:[^\[\]+\-?^]|\[[^\[\]]*\])*")  # signs count in brackets only


@dataclass
class Term:
    """One term, as written, and where each of its parts begins."""

    strength: float
    operator: str
    name: str
    site: str | None
    scope: str
    gate: str | None
    preserve_norm: bool
    at: dict[str, int]


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, what: str, expected: str, remedy: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        raise ConfigError(
            f"{what}, at character {at + 1} of '{self.text}'",
            expected=expected,
            found=repr(self.text[at : at + 24]) if self.text[at:] else "the end of the text",
            remedy=remedy,
        )

    @contextmanager
    def located(self, at: int) -> Iterator[None]:
        """Adds to an error where in the text its cause is."""
        try:
            yield
        except SteerError as error:
            what = f"{error.what}, at character {at + 1} of '{self.text}'"
            raise ConfigError(what, expected=error.expected, found=error.found, remedy=error.remedy) from error

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """What the pattern matches here, spaces before and after it skipped; None for no match."""
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None or not match[0]:
            return None
        self.at = match.end()
        self.skip()
        return match[0]

    def skip(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def mark(self, sign: str) -> bool:
        """Takes a single character if it is the next one."""
        if not self.text.startswith(sign, self.at):
            return False
        self.at += 1
        self.skip()
        return True

    def wanted(self, pattern: re.Pattern[str], what: str, remedy: str) -> str:
        return self.take(pattern) or self.fail(f"no {what}", what, remedy)

    def known(self, what: str, word: str, known: Iterable[str], at: int) -> None:
        if word not in known:
            expected = f"one of {', '.join(known)}" if known else f"a text without them: no {what} was given"
            remedy = did_you_mean(word, known) or f"correct the name, or give that {what} too"
            self.fail(f"no {what} is called '{word}'", expected, remedy, at)

    def terms(self) -> list[Term]:
        self.skip()
        found = [self.term(self.sign() or 1)]
        while self.at < len(self.text):
            sign = self.sign()
            if sign is None:
                self.fail("the plan cannot be read", GRAMMAR, "put a + or - between terms, and a space between a number and a word")
            found.append(self.term(sign))
        return found

    def sign(self) -> int | None:
        return 1 if self.mark("+") else -1 if self.mark("-") else None

    def term(self, sign: int) -> Term:
        at = {"number": self.at}
        number = self.take(_NUMBER)
        at["name"] = self.at
        name = self.wanted(_WORD, "name of a direction", "write e.g. '0.4 warm@response', with a space after a number")
        operator, at["operator"] = "add", at["name"]
        second = self.at
        if word := self.take(_WORD):
            operator, name, at["name"] = name, word, second
        site, scope, gate = None, "all", None
        if self.mark(":"):
            at["site"] = self.at
            site = self.wanted(_SITE, "site", "write e.g. ':layers.12.output', or leave the ':' out")
        if self.mark("@"):
            at["scope"] = self.at
            scope = self.wanted(_SCOPE, "scope", "write e.g. '@response', or leave the '@' out").strip()
        if self.mark("?"):
            at["gate"] = self.at
            gate = self.wanted(_WORD, "name of a gate", "write e.g. '?harmful', or leave the '?' out")
        return Term(sign * float(number or 1), operator, name, site, scope, gate, self.mark("^"), at)


def plan_from_text(text: str, names: Names, gates: Gates | None = None) -> Plan:
    """Reads a plan, see the module's docstring. Each intervention bears the name of its direction.

    Args:
        names: what the directions are called.
        gates: what gates are called.

    Raises:
        ConfigError: what cannot be read, and where; or a name that is not known, and the nearest one.
        WrongModelError: directions of different models.
    """
    of_type(text, str, "a plan as text", "write e.g. '0.4 warm@response'")
    gates = {} if gates is None else gates
    for what, given, kinds in (("direction", names, (Direction, Directions)), ("gate", gates, Gate)):
        of_type(given, Mapping, f"the named {what}s", f"pass {{name: {what}}}")
        for name, one in given.items():
            of_type(one, kinds, f"'{name}' among the named {what}s", f"pass a steer.{what.title()}")
    reader = _Reader(text)
    terms = reader.terms()
    ones = [_intervention(reader, term, names, gates) for term in terms]
    return Plan(ones, fingerprint=_fingerprint({term.name: names[term.name] for term in terms}))


def _intervention(reader: _Reader, term: Term, names: Names, gates: Gates) -> Intervention:
    if term.operator not in OPERATORS and term.operator in names:
        what = f"'{term.operator}' and '{term.name}' stand side by side"
        reader.fail(what, GRAMMAR, "put a + or - between two directions", term.at["name"])
    with reader.located(term.at["operator"]):
        operator = OPERATORS.get(term.operator)
    reader.known("direction", term.name, names, term.at["name"])
    with reader.located(term.at.get("site", term.at["name"])):
        direction, site = direction_at(names[term.name], None if term.site is None else Site.parse(term.site))
    with reader.located(term.at.get("scope", 0)):
        scope = Scope.parse(term.scope)
    if term.gate is not None:
        reader.known("gate", term.gate, gates, term.at["gate"])
    with reader.located(term.at["operator"]):
        edit = _made(operator, direction)
        edit.check_site(site)
    with reader.located(term.at["number"]):
        gate = None if term.gate is None else gates[term.gate]
        return Intervention(edit, site, scope, term.strength, gate=gate, preserve_norm=term.preserve_norm, name=term.name)


def direction_at(given: Direction | Directions, site: Site | None) -> tuple[Direction, Site]:
    """The direction that is meant, and where it acts."""
    if isinstance(given, Directions):
        given = given[site or next(iter(given))] if site or len(given) == 1 else given.best()
    return given, site or given.site


def _made(operator: type[Operator], direction: Direction) -> Operator:
    make: Any = operator
    try:
        return make(direction.vector)
    except TypeError as error:
        raise ConfigError(
            f"operator '{operator.name}' needs more than a direction",
            expected="one that needs nothing but a vector, such as add or ablate",
            found=str(error),
            remedy=f"build the plan in Python, with an Intervention({operator.__name__}(...), ...)",
        ) from None


def _fingerprint(used: Names) -> dict[str, Any] | None:
    """Of the model that the directions were read from, where that is known."""
    first = None
    for name, given in used.items():
        found = given.provenance.get("model") if isinstance(given, Directions) else None
        if found is None:
            continue
        first = first or (name, found)
        ours, theirs = ({key: value for key, value in one.items() if key != "embedding_digest"} for one in (first[1], found))
        if ours != theirs:
            raise WrongModelError(
                f"'{first[0]}' and '{name}' were read from different models",
                expected=ours,
                found=theirs,
                remedy="extract both on the model that is to be steered",
            )
    return None if first is None else first[1]


def plan_to_text(plan: Plan, names: Names, gates: Gates | None = None) -> str:
    """Writes a plan so that `plan_from_text` gives an equal one, with every site and scope spelt out.

    Raises:
        ConfigError: an intervention that has no text form, or whose vector or gate is none of those that are named.
    """
    texts = []
    for one in plan.interventions:
        words = [] if one.operator.name == "add" else [one.operator.name]
        site_and_scope = f"{_name_of(one, names)}:{one.site}@{one.scope}"
        gate = "" if one.gate is None else f" ?{_gate_of(one, gates or {})}"
        texts += [
            "-" if one.strength[0] < 0 else "+",
            " ".join([decimal(abs(one.strength[0])), *words, site_and_scope]) + gate + " ^" * one.preserve_norm,
        ]
    lead = texts.pop(0).replace("+", "")  # no space after the first sign
    return lead + " ".join(texts)


def _name_of(one: Intervention, names: Names) -> str:
    extras = {
        "row slots": one.slots > 1,
        "a schedule": one.schedule != Constant(),
        f"phases {one.phases}": one.phases != PHASES,
        f"roles {one.roles}": one.roles != ("policy",),
        "a switch that is off": not one.enabled,
        "tensors that are learned": bool(one.parameters),
    }
    if any(extras.values()):
        raise ConfigError(
            f"'{one.name}' has no text form",
            expected="an operator, a direction, a site, a scope, a strength and a gate alone",
            found=", ".join(what for what, has in extras.items() if has),
            remedy="keep the plan in a file: plan.save(path)",
        )
    own = one.name.split("#")[0]  # plans number names that repeat
    for name in sorted(names, key=lambda name: name != own):
        given = names[name]
        if isinstance(given, Directions) and one.site not in given.entries:
            continue
        direction, _ = direction_at(given, one.site)
        if len(direction.vector) == one.operator.width and _same_operator(one.operator, direction):
            return name
    raise ConfigError(
        f"'{one.name}' has no text form",
        expected=f"what '{one.operator.name}' makes of one of {', '.join(names) or 'the directions, of which there are none'}",
        found=f"other tensors or settings, at {one.site}",
        remedy="give the direction that it was made of, or keep the plan in a file: plan.save(path)",
    )


def _same_operator(operator: Operator, direction: Direction) -> bool:
    try:
        made = _made(type(operator), direction)
    except ConfigError:
        return False
    return made.options() == operator.options() and _same_tensors(made.tensors, operator.tensors)


def _same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def _same_gate(a: Gate, b: Gate) -> bool:
    """Plans work on copies of their gates."""
    ours, theirs = list(a.site_gates()), list(b.site_gates())
    try:
        return a.to_dict() == b.to_dict() and all(_same_tensors(x.tensors, y.tensors) for x, y in zip(ours, theirs, strict=True))
    except ConfigError:  # a Python function has no file form
        return str(a) == str(b) and [leaf.number for leaf in ours] == [leaf.number for leaf in theirs]


def _gate_of(one: Intervention, gates: Gates) -> str:
    assert one.gate is not None
    for name, gate in gates.items():
        if _same_gate(gate, one.gate):
            return name
    raise ConfigError(
        f"the gate of '{one.name}' has no name",
        expected=f"one of {', '.join(gates)}" if gates else "a named gate",
        found=str(one.gate),
        remedy="give it in gates={name: gate}",
    )
