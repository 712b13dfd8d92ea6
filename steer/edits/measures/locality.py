"""Locality: does what has nothing to do with the edit stay as it was?

As MEMIT (Meng et al. 2022, arXiv 2210.07229) and EasyEdit measure it on zsRE.
"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, SHARE, Column, EditMeasure, Readings, Wanted, mean
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("locality")
class Locality(EditMeasure):
    """Answers to unrelated questions: tokens that are the likeliest (as in MEMIT), and tokens said as before (as in EasyEdit)."""

    columns = (
        Column("locality", "locality", SHARE, None, "share of the tokens of right answers to unrelated questions that are the likeliest"),
        Column("agreement", "agreement", SHARE, "higher", "share of the tokens said in their places that are the same as before the edit"),
    )

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(answers=tuple((probe.prompt, probe.answer) for probe in record.locality))

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        if not record.locality:
            return {}
        questions = [(probe.prompt, probe.answer) for probe in record.locality]
        said = [seen.answers[question] for question in questions]
        found = {"locality": mean([answer.accuracy for answer in said])}
        if before is None:
            return found
        pairs = [(answer.predicted, before.answers[question].predicted) for answer, question in zip(said, questions, strict=True)]
        return {**found, "agreement": mean([mean([a == b for a, b in zip(*pair, strict=True)]) for pair in pairs])}
