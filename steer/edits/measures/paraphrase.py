"""Paraphrase: does the edit hold where the fact is asked for in other words?

PS and PM of ROME (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, EditMeasure, Readings, Wanted
from steer.edits.measures._preference import asked, preference, preference_columns
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("paraphrase")
class Paraphrase(EditMeasure):
    """The new object behind paraphrases: preferred (PS), by how much (PM), and said (accuracy)."""

    columns = preference_columns("paraphrase", ("PS", "PM", "paraphrase accuracy"), "new", "true", "paraphrases")

    def wanted(self, record: FactRecord) -> Wanted:
        return asked(record, record.paraphrases)

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        return preference("paraphrase", seen, record.paraphrases, record.fact.target, record.fact.true)
