"""Portability: does what follows from the new fact follow in the model? (Yao et al. 2023, arXiv 2305.13172)"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, SHARE, Column, EditMeasure, Readings, Wanted, mean
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("portability")
class Portability(EditMeasure):
    """Answers that follow from the edit, such as one hop further: tokens that are the likeliest, each behind the right ones."""

    columns = (Column("portability", "portability", SHARE, "higher", "share of the tokens of answers that follow that are the likeliest"),)

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(answers=tuple((probe.prompt, probe.answer) for probe in record.portability))

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        if not record.portability:
            return {}
        return {"portability": mean([seen.answers[probe.prompt, probe.answer].accuracy for probe in record.portability])}
