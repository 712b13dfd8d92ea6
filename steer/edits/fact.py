"""Fact: what an edit shall make a model say: a prompt, the subject in it, and the answer.

Example:
    >>> Fact.of("The mother tongue of {} is", "Danielle Darrieux", "English", true="French")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from steer.checks import of_type
from steer.errors import ConflictingEditsError, EditError, SubjectNotFoundError

_GAP = "{}"  # of a template, filled with the subject
_BLANKS = " \t\u00a0"


@dataclass(frozen=True)
class Fact:
    """One fact to be written into a model.

    Attributes:
        prompt: the text that ends before the answer and contains the subject; blanks at its end are taken off, since one belongs to the
            first token of the answer.
        subject: as it stands in the prompt.
        target: the new answer, without blanks around it; what is scored is a blank and the target.
        true: the answer that counts as true, likewise; only measures need it.
        name: identifies the fact; a digest of everything else where none is given.

    Raises:
        SubjectNotFoundError: the subject is not in the prompt. EditError: an empty subject or answer. ConfigError: no text.

    Example:
        >>> steer.Fact("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English", true="French")
    """

    prompt: str
    subject: str
    target: str
    true: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("prompt", "subject", "target", "name"):
            of_type(getattr(self, field), str, f"the {field} of a fact", "pass text")
        of_type(self.true, (str, type(None)), "the true answer of a fact", "pass text, or leave it out")
        self._set(prompt=self.prompt.rstrip(_BLANKS), subject=self.subject.strip(), target=self.target.strip())
        if self.true is not None:
            self._set(true=self.true.strip())
        for field in ("subject", "target", "true"):
            if getattr(self, field) == "":
                raise _empty(field, self)
        if self.subject not in self.prompt:
            raise _no_subject(self)
        if not self.name:
            self._set(name=_digest([self.prompt, self.subject, self.target, self.true]))

    def _set(self, **values: str) -> None:
        for field, value in values.items():
            object.__setattr__(self, field, value)  # the dataclass is frozen

    @classmethod
    def of(cls, prompt: str, subject: str, target: str, true: str | None = None, name: str = "") -> Fact:
        """A fact from a prompt, or from a template with `{}` in the place of the subject. Raises as the class."""
        of_type(prompt, str, "the prompt of a fact", "pass text")
        of_type(subject, str, "the subject of a fact", "pass text")
        return cls(prompt.replace(_GAP, subject.strip()), subject, target, true, name)

    def with_target(self, target: str) -> Fact:
        """The same question with another answer, under a name of its own."""
        return replace(self, target=target, name="")

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fact:
        """Raises EditError for anything but the fields of a fact, and as the class."""
        of_type(content, Mapping, "a fact", "pass an object with prompt, subject and target")
        known = {field.name for field in fields(cls)}
        if set(content) - known or not {"prompt", "subject", "target"} <= set(content):
            raise _other_fields(content, known)
        return cls(**content)


def distinct_facts(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts of one edit, each once, in their order.

    Raises:
        ConflictingEditsError: the same prompt with different targets. EditError: no facts. ConfigError: something else.

    Example:
        >>> len(steer.edits.distinct_facts([fact, fact]))
        1
    """
    of_type(facts, (list, tuple), "the facts of an edit", "pass a list of facts")
    answers: dict[str, Fact] = {}
    distinct: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        of_type(fact, Fact, "one of the facts of an edit", "make it with steer.edits.Fact.of(prompt, subject, target)")
        other = answers.setdefault(fact.prompt, fact)
        if other.target != fact.target:
            raise _conflict(other, fact)
        distinct.setdefault((fact.prompt, fact.subject), fact)
    if not distinct:
        raise _no_facts()
    return tuple(distinct.values())


def _digest(parts: list[str | None]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# ---- errors


def _empty(field: str, fact: Fact) -> EditError:
    what = {"subject": "the subject", "target": "the target", "true": "the true answer"}[field]
    remedy = "leave it out" if field == "true" else "say what it is"
    return EditError(f"{what} of a fact is empty", expected="text with at least one letter", found=repr(fact.prompt), remedy=remedy)


def _no_subject(fact: Fact) -> SubjectNotFoundError:
    return SubjectNotFoundError(
        f"the subject '{fact.subject}' is not in its prompt",
        expected="a prompt that contains the subject as it is written, or a template with {} in its place",
        found=repr(fact.prompt),
        remedy="write both alike, capitals and blanks included",
    )


def _other_fields(content: Mapping[str, Any], known: set[str]) -> EditError:
    return EditError(
        "this is no fact",
        expected=f"prompt, subject and target, and of {', '.join(sorted(known - {'prompt', 'subject', 'target'}))} any",
        found=", ".join(map(str, content)) or "nothing",
        remedy="write it with Fact.as_json()",
    )


def _conflict(first: Fact, second: Fact) -> ConflictingEditsError:
    return ConflictingEditsError(
        f"two facts answer '{first.prompt}' differently",
        expected="one answer to one prompt in an edit",
        found=f"'{first.target}' and '{second.target}'",
        remedy="leave one out, or apply them one after the other: the last one wins",
    )


def _no_facts() -> EditError:
    return EditError("there is nothing to edit", expected="at least one fact", found="none", remedy="pass [Fact.of(...)]")
