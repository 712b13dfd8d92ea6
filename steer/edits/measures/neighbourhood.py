"""Neighbourhood: does what is true of other subjects stay true?

NS and NM of ROME (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, EditMeasure, Readings, Wanted
from steer.edits.measures._preference import asked, preference, preference_columns
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("neighbourhood")
class Neighbourhood(EditMeasure):
    """The true object behind prompts about other subjects of which it is true: preferred (NS), by how much (NM), and said (accuracy)."""

    columns = preference_columns("neighbourhood", ("NS", "NM", "neighbourhood accuracy"), "true", "new", "neighbours")

    def wanted(self, record: FactRecord) -> Wanted:
        return asked(record, record.neighbours)

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        return preference("neighbourhood", seen, record.neighbours, record.fact.true, record.fact.target)
