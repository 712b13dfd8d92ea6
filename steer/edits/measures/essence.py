"""Essence drift: does the model still know the rest of what it knew about the subject?

As the code of ROME has it (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

import math

from steer.edits.measure import EDIT_MEASURES, Column, EditMeasure, Readings, Wanted, mean
from steer.edits.record import FactRecord


@EDIT_MEASURES.register("essence")
class Essence(EditMeasure):
    """Perplexity of texts about the subject, their first 100 tokens; not available without such texts."""

    columns = (Column("essence", "essence perplexity", "", None, "perplexity of texts about the subject, their first 100 tokens"),)

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(read=record.essence_texts)

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        if not record.essence_texts:
            return {}
        return {"essence": math.exp(mean([seen.losses[text] for text in record.essence_texts]))}
