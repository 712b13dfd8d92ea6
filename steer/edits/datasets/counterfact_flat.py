"""CounterFact in the flat form that EasyEdit gave it: one paraphrase and one neighbour a record, further ones gathered from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, name_in, probes_in, texts_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat

NEIGHBOURS = 10  # as many as CounterFact has


@RECORD_FORMATS.register("counterfact_flat")
class FlatCounterFact(RecordFormat):
    """CounterFact as EasyEdit ships it: one prompt of each kind a record; records with the same template and true object are neighbours."""

    keys = ("prompt", "subject", "target_new", "ground_truth")

    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        prompt, subject, target = fields(row, {"prompt": str, "subject": str, "target_new": str}, source, place)
        fact = Fact.of(prompt, subject, target, _first(row["ground_truth"]), name_in(row, "case_id"))
        probes = probes_in(row, "locality", source, place)
        neighbours = [probe for probe in probes if probe.answer == fact.true and not probe.kind]
        return FactRecord(
            fact,
            paraphrases=texts_in(row, "rephrase_prompt", source, place) + texts_in(row, "rephrase", source, place),
            neighbours=tuple(probe.prompt for probe in neighbours),
            portability=probes_in(row, "portability", source, place),
            locality=tuple(probe for probe in probes if probe not in neighbours),
        )

    def joined(self, records: list[FactRecord]) -> list[FactRecord]:
        """Gathers up to ten neighbours: a record's own first, then prompts about other subjects in the order of the file."""
        about: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # prompts by template and true object
        for record in records:
            about[_kind_of(record)] |= dict.fromkeys((record.fact.prompt, *record.neighbours))
        return [_with_neighbours(record, list(about[_kind_of(record)])) for record in records]


def _first(true: Any) -> str | None:
    """The true object; the first of several right ones."""
    while isinstance(true, list) and true:
        true = true[0]
    return true if isinstance(true, str) and true.strip() else None


def _kind_of(record: FactRecord) -> tuple[str, str]:
    """Template and true object."""
    return record.fact.prompt.replace(record.fact.subject, "{}"), record.fact.true or ""


def _with_neighbours(record: FactRecord, about: list[str]) -> FactRecord:
    fact = record.fact
    others = [] if fact.true is None else [prompt for prompt in about if fact.subject not in prompt]
    return replace(record, neighbours=tuple(dict.fromkeys((*record.neighbours, *others)))[:NEIGHBOURS])
