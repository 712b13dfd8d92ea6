"""Efficacy: does the edited model prefer the new object behind the prompt of the edit?

ES and EM of ROME (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, EditMeasure, Readings, Wanted
from steer.edits.measures._preference import asked, preference, preference_columns
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("efficacy")
class Efficacy(EditMeasure):
    """The new object behind the prompt of the edit: preferred (ES), by how much (EM), and said (accuracy)."""

    columns = preference_columns("efficacy", ("ES", "EM", "efficacy accuracy"), "new", "true", "edits")

    def wanted(self, record: FactRecord) -> Wanted:
        return asked(record, [record.fact.prompt])

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        return preference("efficacy", seen, [record.fact.prompt], record.fact.target, record.fact.true)
