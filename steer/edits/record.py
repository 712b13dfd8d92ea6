"""FactRecord: an edit, and the prompts that show what it changed: paraphrases, neighbours, and what should have moved or stayed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steer.checks import of_type
from steer.edits.fact import Fact
from steer.reading import damaged

FIELDS = ("paraphrases", "neighbours", "generation_prompts", "reference_texts", "essence_texts")  # lists of texts
PROBES = ("portability", "locality")
IDENTIFIERS = ("relation", "target_id", "true_id")


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer that is right after an edit.

    Attributes:
        kind: of a portability probe, such as `alias`, `one hop` or `reverse`; of a locality probe, what it is about.

    Example:
        >>> probe = steer.edits.Probe("The city in which the Louvre is lies in", "Italy", "one hop")
        >>> record = steer.edits.FactRecord(fact, portability=(probe,))
    """

    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class FactRecord:
    """A fact to be edited, with the prompts that it is measured on.

    Attributes:
        fact: prompt, subject, target; `fact.true` is what was true before, without which scores of preference have no value.
        paraphrases: prompts that ask for the same fact in other words.
        neighbours: prompts about other subjects whose answer is `fact.true`, and stays it.
        generation_prompts: that a model goes on from; the fact's own prompt and its paraphrases where there are none.
        reference_texts: texts about the target, which what is written after the edit should resemble.
        essence_texts: texts about the subject, whose perplexity should stay.
        portability: what follows from the fact. locality: what has nothing to do with it, with the right answers.
        relation, target_id, true_id: identifiers of Wikidata, by which texts about an object are found; empty where a data set has none.

    Example:
        >>> fact = steer.Fact.of("{} is in the city of", "The Eiffel Tower", "Rome", true="Paris")
        >>> record = steer.edits.FactRecord(fact, neighbours=("The Louvre is in the city of",))
    """

    fact: Fact
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()
    essence_texts: tuple[str, ...] = ()
    portability: tuple[Probe, ...] = field(default=())
    locality: tuple[Probe, ...] = field(default=())
    relation: str = ""
    target_id: str = ""
    true_id: str = ""

    def __post_init__(self) -> None:
        for name in (*FIELDS, *PROBES):
            kind, values = (str, "texts") if name in FIELDS else (Probe, "probes")
            told = getattr(self, name)
            of_type(told, (tuple, list), f"the {name} of a record", f"pass a tuple of {values}, also where there is one alone")
            for value in told:
                of_type(value, kind, f"one of the {name} of a record", f"pass a tuple of {values}")
            object.__setattr__(self, name, tuple(told))  # the dataclass is frozen

    @property
    def name(self) -> str:
        return self.fact.name

    def as_json(self) -> dict[str, Any]:
        """JSON-able; what is empty is left out."""
        lists: dict[str, Any] = {name: list(getattr(self, name)) for name in FIELDS}
        lists |= {name: [vars(probe) for probe in getattr(self, name)] for name in PROBES}
        lists |= {name: getattr(self, name) for name in IDENTIFIERS}
        return {"fact": self.fact.as_json(), **{name: value for name, value in lists.items() if value}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FactRecord:
        """What `as_json` gave."""
        told: dict[str, Any] = {name: tuple(content.get(name, ())) for name in FIELDS}
        told |= {name: tuple(Probe(**probe) for probe in content.get(name, ())) for name in PROBES}
        return cls(Fact.from_json(content["fact"]), **told, **{name: content.get(name, "") for name in IDENTIFIERS})


def record_of(value: Any) -> FactRecord:
    """A record; of a fact alone, one without any prompts beside its own. Raises ConfigError for anything else."""
    of_type(value, (FactRecord, Fact), "one of the records", "pass what steer.edits.load_records gives, or facts")
    return value if isinstance(value, FactRecord) else FactRecord(value)


def without_edited_subjects(records: Sequence[FactRecord]) -> tuple[list[FactRecord], int]:
    """Records whose neighbours name no subject that is edited with them, since those are no neighbours of the whole: and how many went."""
    named = re.compile("|".join(rf"(?<!\w){re.escape(subject)}(?!\w)" for subject in {record.fact.subject for record in records}))
    kept = [replace(record, neighbours=tuple(prompt for prompt in record.neighbours if not named.search(prompt))) for record in records]
    return kept, sum(len(a.neighbours) - len(b.neighbours) for a, b in zip(records, kept, strict=True))


# ---- rows of files


def name_in(row: Mapping[str, Any], key: str) -> str:
    """The number of a record as its name; empty where it has none."""
    return "" if row.get(key) is None else str(row[key])


def texts_in(row: Mapping[str, Any], key: str, source: object, place: object) -> tuple[str, ...]:
    """A list of texts, one text, or nothing. Raises DamagedFileError."""
    value = row.get(key)
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise damaged(str(source), f"texts as '{key}'", f"{value!r:.60} at {place}")
    return tuple(text.strip() for text in texts if text.strip())


def probes_in(row: Mapping[str, Any], key: str, source: object, place: object) -> tuple[Probe, ...]:
    """Probes of a row: `<key>_prompt` with `<key>_ground_truth`, or an object {kind: [{prompt, ground_truth}, ...]} as `<key>`.

    Raises:
        DamagedFileError: probes of another form.
    """
    prompts, answers = texts_in(row, f"{key}_prompt", source, place), texts_in(row, f"{key}_ground_truth", source, place)
    if len(prompts) != len(answers):
        raise damaged(str(source), f"an answer for each '{key}_prompt'", f"{len(prompts)} prompts, {len(answers)} answers at {place}")
    found = [Probe(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    groups = row.get(key) or {}
    if not isinstance(groups, Mapping):
        raise damaged(str(source), f"an object of lists as '{key}'", f"{groups!r:.60} at {place}")
    if "New Question" in groups:  # of the zsRE records that EasyEdit released with answers of GPT-4
        groups = {"one hop": {"prompt": groups["New Question"], "ground_truth": groups.get("New Answer")}}
    for kind, probes in groups.items():
        for probe in probes if isinstance(probes, list) else [probes]:
            found.append(_probe(probe, str(kind), source, place))
    return tuple(found)


def _probe(probe: Any, kind: str, source: object, place: object) -> Probe:
    """One of several right answers counts as the answer: the first."""
    if isinstance(probe, Mapping) and isinstance(probe.get("prompt"), str):
        answer = probe.get("ground_truth")
        while isinstance(answer, list) and answer:
            answer = answer[0]
        if isinstance(answer, str) and answer.strip():
            return Probe(probe["prompt"].strip(), answer.strip(), kind.replace("_", " ").lower())
    raise damaged(str(source), "probes {prompt, ground_truth}", f"{probe!r:.80} at {place}")
